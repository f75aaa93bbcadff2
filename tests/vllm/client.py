"""A server of the tiny model in a process of its own, and what tests ask of it over HTTP."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

KEY = {"X-Fastsae-Key": "a-second-key"}
UNSTEERED = {"prompt": [5, 6, 7], "steering": None, "tokens": 2}


def call(url, body=None, *, method=None, headers=(), timeout=60):
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": "application/json", **dict(headers)}
    request = urllib.request.Request(url, data, sent, method=method)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    return SimpleNamespace(status=status, text=text.decode(errors="replace"))


@contextlib.contextmanager
def started(tiny, folder, environment, elsewhere, *, flags=None, environ=(), **more):
    """A server on a free port, its admin keys and its audit file; killed at the end.

    flags: for `vllm serve`, which starts several; more: settings of the plugin.
    """
    (elsewhere / "keys").write_text("a-first-key\na-second-key\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = tiny.engine_arguments(folder)
    model = arguments.pop("model")
    told = ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "tiny"]
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        told += [flag] if value is True else [flag, str(value)]
    audit = elsewhere / f"{port}.jsonl"
    keys = str(elsewhere / "keys")
    more = {"admin_keys": keys, "audit": str(audit), "max_policies": 6} | more
    settings = tiny.settings(folder, **more)
    told += ["--additional-config", json.dumps(settings)]
    command = ["-m", "vllm.entrypoints.openai.api_server"]
    if flags is not None:  # its model is an argument, not an option
        command = [str(Path(__file__).with_name("serve.py")), "serve", model, *flags]
    else:
        told += ["--model", model]
    log = (elsewhere / f"{port}.log").open("w+")
    process = subprocess.Popen(
        [sys.executable, "-P", *command, *told],
        cwd=elsewhere,
        env=environment | {"VLLM_PLUGINS": "fastsae"} | dict(environ),
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    url = f"http://127.0.0.1:{port}"
    server = SimpleNamespace(process=process, url=url, audit=audit)
    try:
        for _ in range(240):
            assert process.poll() is None, open(log.name).read()[-6000:]
            with contextlib.suppress(OSError):
                if call(f"{url}/health").status == 200:
                    break
            time.sleep(1)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def completion(server, request, **more):
    body = {
        "model": "tiny",
        "prompt": request["prompt"],
        "max_tokens": request["tokens"],
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }
    if request["steering"] is not None:
        body["steering"] = request["steering"]
    return body


def tokens_of(answer) -> list[int]:
    assert answer.status == 200, answer.text
    return json.loads(answer.text)["choices"][0]["token_ids"]


def status_of(server):
    answer = call(f"{server.url}/fastsae/status", headers=KEY)
    assert answer.status == 200, answer.text
    return json.loads(answer.text)


def stream(server, body):
    """Yields the tokens of each chunk; leaving the iteration hangs up."""
    data = json.dumps(body | {"stream": True}).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/completions", data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                yield chunk["choices"][0]["token_ids"] or []


def wait_until_idle(server):
    for _ in range(100):
        status = status_of(server)
        if not any(status["in_use"]) and status["held"] == 0:
            break
        time.sleep(0.2)
    # Workers hear of the last requests that finished with the next step.
    call(f"{server.url}/v1/completions", completion(server, UNSTEERED))
    status = status_of(server)
    assert not any(status["in_use"]) and status["held"] == 0
    assert all(each["requests"] == each["policies"] == 0 for each in status["workers"])


def processes_of(server) -> dict[str, int]:
    """The server's and its engines' process ids, by name."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,command=", "-g", str(server.process.pid)], capture_output=True, text=True
    ).stdout
    engines = [int(line.split()[0]) for line in listed.splitlines() if "EngineCore" in line]
    assert engines, listed
    return {"server": server.process.pid} | {f"engine {i}": pid for i, pid in enumerate(engines)}


def mebibytes_of(server) -> dict[str, float]:
    """Resident memory of each of its processes."""
    found = {}
    for name, pid in processes_of(server).items():
        command = ["ps", "-o", "rss=", "-p", str(pid)]
        found[name] = int(subprocess.run(command, capture_output=True, text=True).stdout) / 1024
    return found
