"""vLLM in an environment of its own (`make test-vllm`); elsewhere only what needs no vLLM runs."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
HAS_VLLM = importlib.util.find_spec("vllm") is not None
WITH_VLLM = ("engine", "fuzz", "killed", "middleware", "parallel", "server")
# The middleware counts with prometheus_client, which every vLLM brings along.
collect_ignore = [] if HAS_VLLM else [f"test_{name}.py" for name in WITH_VLLM]


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny():
    return _module("tiny")


@pytest.fixture(scope="module")
def start(tiny, folder, environment, tmp_path_factory):
    """Starts a server: see client.started."""
    elsewhere = tmp_path_factory.mktemp("server")
    return functools.partial(_module("client").started, tiny, folder, environment, elsewhere)


@pytest.fixture(scope="session")
def folder(tiny, tmp_path_factory):
    """The tiny model, its SAE and its policies."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.make(path)
    return path


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CACHE_ROOT": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="session")
def run_engine(folder, tiny, environment, tmp_path_factory):
    """Starts one engine, runs batches in it, returns its results; vanilla means without plugin."""
    # Not the repository: vLLM runs `python -m`, and would find our kernels/ for a package.
    elsewhere = tmp_path_factory.mktemp("runs")

    def run(batches, *, steered=True, commands=(), settings=(), environ=(), **arguments):
        result = elsewhere / f"{len(list(elsewhere.iterdir()))}.json"
        job = {
            "arguments": tiny.engine_arguments(folder, **arguments),
            "settings": tiny.settings(folder, **dict(settings)) if steered else None,
            "batches": batches,
            "commands": list(commands),
            "result": str(result),
        }
        environ = environment | dict(environ) | ({} if steered else {"VLLM_PLUGINS": ""})
        done = subprocess.run(
            [sys.executable, "-P", str(HERE / "engine_run.py")],
            input=json.dumps(job),
            cwd=elsewhere,
            env=environ,
            capture_output=True,
            text=True,
            timeout=900,
        )
        if not result.exists():
            return SimpleNamespace(failed=True, log=done.stdout + done.stderr)
        return SimpleNamespace(failed=False, log=done.stderr, **json.loads(result.read_text()))

    return run


@pytest.fixture(scope="session")
def expected(folder, tiny):
    """Greedy tokens of the Hugging Face adapter on the same weights, one request at a time."""
    import torch
    from transformers import AutoModelForCausalLM

    import fastsae
    from fastsae import Policy

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    sae = fastsae.SAE.from_pretrained(folder / "sae")
    of_the_file = Policy.from_file(folder / "policies.json")
    model.generation_config.eos_token_id = None

    def tokens(request, dose=None, policies=()) -> list[int]:
        by_label = {policy.label: policy for policy in [*of_the_file, *policies]}
        ids = torch.tensor([request["prompt"]])
        asked = {"max_new_tokens": request["tokens"], "do_sample": False, "pad_token_id": 0}
        if request["steering"] is None:
            return model.generate(ids, **asked)[0, ids.shape[1] :].tolist()
        wish = request["steering"]
        with fastsae.steer(
            model,
            sae,
            by_label[wish["policy"]],
            strength=wish.get("strength", 1.0),
            dose=dose,
        ):
            return model.generate(ids, **asked)[0, ids.shape[1] :].tolist()

    return tokens


@pytest.fixture(scope="session")
def crowd(tiny):
    """32 requests: 8 policies, several strengths and lengths, every fourth unsteered."""
    requests = []
    for i in range(32):
        steering = {"policy": f"p{i % 8}@1", "strength": [1.0, 0.5, 1.5, -1.0][i % 5 % 4]}
        if i >= 24:
            steering = None
        requests.append({"prompt": tiny.prompt(i, 5 + 3 * i), "steering": steering, "tokens": 16})
    return requests
