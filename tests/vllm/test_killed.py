"""An engine that is killed under load, and the server that is started after it."""

import concurrent.futures
import http.client
import importlib.util
import json
import os
import signal
from pathlib import Path

_spec = importlib.util.spec_from_file_location("client", Path(__file__).with_name("client.py"))
client = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(client)
call, completion, tokens_of = client.call, client.completion, client.tokens_of
status_of, stream, KEY = client.status_of, client.stream, client.KEY


def test_a_killed_engine_loses_only_its_requests_and_restarts_clean(start, crowd, expected):
    with start() as server, concurrent.futures.ThreadPoolExecutor(64) as pool:
        url = f"{server.url}/v1/completions"
        request = crowd[1]
        assert tokens_of(call(url, completion(server, request))) == expected(request)
        longer = completion(server, request | {"tokens": 300})
        engines = [pid for name, pid in client.processes_of(server).items() if name != "server"]
        running = [pool.submit(call, url, longer) for _ in range(32)]
        next(stream(server, longer))  # the engine is at work
        for pid in engines:
            os.kill(pid, signal.SIGSTOP)
        # Nothing that comes to a stopped engine can be answered, however long any of this takes.
        waiting = [pool.submit(call, url, longer) for _ in range(8)]
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        lost = [is_lost(future) for future in running + waiting]  # none waits for ever
        assert all(lost[len(running) :])
        server.process.wait(timeout=60)
    with start(latency_budget_ms=1e-6) as server:  # for the guard, below
        status = status_of(server)
        assert status["armed"] and not any(status["in_use"])
        answer = call(f"{server.url}/v1/completions", completion(server, request))
        assert tokens_of(answer) == expected(request)
        drop_optional_policies(server, crowd[1], expected)


def drop_optional_policies(server, request, expected):
    """No token is as fast as this server's budget asks for: the guard opens, and optional policies
    are dropped, required ones never."""
    url, policies = f"{server.url}/v1/completions", f"{server.url}/fastsae/policies"
    operations = [{"op": "add", "features": [3], "strength": 9.0}]  # those of p1
    must = {"name": "must", "required": True, "operations": operations}
    assert call(policies, must, method="POST", headers=KEY).status == 200
    plain = expected(request | {"steering": None})
    for _ in range(5):  # the guard looks at the last seconds only
        call(url, completion(server, request | {"tokens": 100}))
        dropped = tokens_of(call(url, completion(server, request))) == plain
        kept = request | {"steering": request["steering"] | {"policy": "must"}}
        assert tokens_of(call(url, completion(server, kept))) == expected(request) != plain
        if dropped:
            break
    last = [json.loads(line) for line in server.audit.read_text().splitlines()[-2:]]
    assert [line["reason"] for line in last] == ["latency", "steered"]


def is_lost(future) -> bool:
    try:
        answer = future.result(timeout=90)
    except (OSError, http.client.HTTPException) as error:  # cut off before or within the answer
        assert not isinstance(error, TimeoutError), "a client waited for ever"
        return True
    assert answer.status >= 500 or len(tokens_of(answer)) == 300
    return answer.status >= 500
