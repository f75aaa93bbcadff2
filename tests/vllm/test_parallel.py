"""Two API servers in front of two data-parallel engines: what one is told, all of them know."""

import concurrent.futures
import importlib.util
import json
import time
from pathlib import Path

_spec = importlib.util.spec_from_file_location("client", Path(__file__).with_name("client.py"))
client = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(client)
call, completion, tokens_of, KEY = client.call, client.completion, client.tokens_of, client.KEY

FLAGS = ("--api-server-count", "2", "--data-parallel-size", "2")
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # one for each engine


def added(strength):
    operation = {"op": "add", "features": [3], "strength": strength}
    return {"name": "new", "operations": [operation]}


def test_policies_reach_every_engine_from_every_server(start, crowd, expected):
    with (
        start(flags=FLAGS, environ=CORES) as server,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        url, policies = f"{server.url}/v1/completions", f"{server.url}/fastsae/policies"
        status = client.status_of(server)
        assert status["armed"] and status["engines"] == 2 and len(status["workers"]) == 2
        # p1 of the file adds 9 times feature 3; every connection finds one of the servers.
        request = crowd[1] | {"tokens": 6}
        body = completion(server, request | {"steering": {"policy": "new"}})
        plain, known = (
            expected(request | {"steering": each})
            for each in (None, {"policy": "p1@1", "strength": 1.0})
        )
        assert call(url, body).status == 400
        assert call(policies, added(9.0), method="POST", headers=KEY).status == 200
        answers = list(pool.map(lambda _: tokens_of(call(url, body)), range(24)))
        assert answers == [known] * 24 and known != plain
        rows = [worker["steered_rows"] for worker in client.status_of(server)["workers"]]
        assert min(rows) > 0, f"both engines were meant to steer: {rows}"
        watched = json.loads(call(f"{server.url}/fastsae/watched", headers=KEY).text)["watched"]
        assert watched["new"]["tokens"] == sum(rows)
        # Replaced while they are asked, over and over: one of the two, never an error.
        asked = [pool.submit(call, url, body) for _ in range(80)]
        changes = 0
        while not all(each.done() for each in asked):
            sign = -1 if changes % 2 else 1
            assert call(policies, added(9.0 * sign), method="PUT", headers=KEY).status == 200
            changes += 1
        seen = {tuple(tokens_of(each.result())) for each in asked}
        other = expected(request | {"steering": {"policy": "p1@1", "strength": -1.0}})
        assert seen <= {tuple(known), tuple(other)} and changes > 1
        assert call(f"{policies}/new", method="DELETE", headers=KEY).status == 200
        time.sleep(1.1)  # the other server asks again after a second
        assert {each.status for each in pool.map(lambda _: call(url, body), range(16))} == {400}
        client.wait_until_idle(server)
