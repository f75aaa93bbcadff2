"""Labels from a fake OpenAI-compatible server that fails in every way, and from a local model."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.explain import Explanations, SAEIdentity, Vocabulary, chat, labels
from fastsae.explain.chat import Cached, Endpoint, LocalModel
from fastsae.explain.examples import Example, FeatureExamples
from fastsae.explain.labels import Labels, label_features

F = 6
WORDS = Vocabulary(("music", "song", "guitar", "bank", "money", "loan"))


class Server(ThreadingHTTPServer):
    """Plays `script`, one entry per request (then "ok"): a status, or a way to fail."""

    def __init__(self, script=()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = list(script), [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            act = self.server.script.pop(0) if self.server.script else "ok"
        asked = body["messages"][-1]["content"]
        judging = asked.endswith("no):")
        text = "Probably." if judging else "\n Label: “notes” of music\nand more"
        answer = {
            "choices": [{"message": {"content": text}}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 4},
        }
        status, payload, headers = 200, json.dumps(answer).encode(), {}
        if act == "slow":
            time.sleep(1.0)
        elif act == "malformed":
            payload = b'{"choices": ['
        elif act == "null":
            payload = b'{"choices": [{"message": {"content": null}}]}'
        elif act == "empty":
            payload = b"[]"
        elif act == "cut":
            headers["Content-Length"] = str(len(payload) + 50)
        elif act == "wait":
            status, payload, headers = 429, b"slow down", {"Retry-After": "7"}
        elif isinstance(act, int):
            status, payload = act, b'{"error": "no\\n luck"}'
        try:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(payload))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(payload)
        except OSError:
            pass  # the client has gone


@pytest.fixture
def serve():
    running = []

    def start(*script):
        server = Server(script)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have slept."""
    slept = []
    monkeypatch.setattr(chat.time, "sleep", slept.append)
    return slept


@pytest.fixture
def ex():
    indices = torch.tensor([[i, (i + 1) % F] for i in range(F)], dtype=torch.int32)
    identity = SAEIdentity("blocks.1.hook_resid_post", "m", "topk", 4, F, "abc")
    scores = torch.tensor([[2.0, 1.0]] * F)
    return Explanations(scores, indices, WORDS, "mi", 1.0, "m", identity)


ASK = [{"role": "user", "content": "hello"}]


def test_every_failure_is_tried_again(serve, monkeypatch):
    real, slept = time.sleep, []
    script = [429, 500, 503, "malformed", "null", "empty", "cut", "slow", "wait"]
    server = serve(*script)
    endpoint = Endpoint(server.url, "m", timeout=0.3, retries=len(script), wait=0.001)
    monkeypatch.setattr(chat.time, "sleep", lambda s: slept.append(s) or real(0))
    # The server's own pause goes through the same module.
    monkeypatch.setattr(time, "sleep", lambda s: real(s) if s == 1.0 else slept.append(s))
    reply = endpoint.complete(ASK)
    assert reply.text.startswith("\n Label") and reply[1:] == (100, 4)
    assert len(server.requests) == len(script) + 1
    assert slept[:8] == pytest.approx([0.001 * 2**i for i in range(8)])
    assert slept[8] == 7.0  # Retry-After


def test_what_is_sent(serve, monkeypatch):
    server = serve()
    monkeypatch.setenv("SOME_KEY", "secret")
    Endpoint(server.url + "/", "org/m", key_variable="SOME_KEY").complete(ASK, 12)
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body == {"model": "org/m", "messages": ASK, "max_tokens": 12, "temperature": 0}
    monkeypatch.delenv("SOME_KEY")
    Endpoint(server.url, "org/m", key_variable="SOME_KEY").complete(ASK)
    assert "Authorization" not in server.requests[1][1]


def test_errors_that_no_retry_mends(serve, waits):
    with pytest.raises(FastsaeError, match=r"status 401 .*no.*luck.*variable SOME_KEY"):
        Endpoint(serve(401).url, "m", key_variable="SOME_KEY").complete(ASK)
    with pytest.raises(FastsaeError, match="status 404"):
        Endpoint(serve(404).url, "m").complete(ASK)
    assert waits == []
    with pytest.raises(FastsaeError, match=r"no answer after 3 attempts.*status 500"):
        Endpoint(serve(500, 500, 500).url, "m", retries=2).complete(ASK)
    assert waits == [1.0, 2.0]
    with pytest.raises(FastsaeError, match="no answer after 1 attempts"):
        Endpoint("http://127.0.0.1:9/v1", "m", retries=0).complete(ASK)
    with pytest.raises(FastsaeError, match="base_url: got 'localhost"):
        Endpoint("localhost:8000", "m")


class OneFeature(dict):
    """Examples by hand."""


def test_labels_and_verdicts(serve, ex):
    place = [Example(2.0, 0, 3, ("the", " song", " of"), (0.0, 2.0, 0.0), 1)]
    other = [Example(1.0, 4, 2, ("a", " tune"), (0.0, 1.0), 1)]
    examples = OneFeature({2: FeatureExamples(place + other, 2, [1.0, 2.0], [2])})
    server = serve()
    found = label_features(ex, Endpoint(server.url, "m"), [2, 0, 2], examples, workers=2)
    assert list(found) == [2, 0] and found.digest == "abc"
    assert found[2] == ("“notes” of music", "probably", "m")
    asked = [body["messages"][0]["content"] for _, _, body in server.requests]
    assert len(asked) == 4
    wrote, judged = [a for a in asked if "Words: guitar, bank\n" in a]
    assert "the [[song]] of" in wrote and "tune" not in wrote
    assert "a [[tune]]" in judged and "the [[song]] of" not in judged  # unseen evidence
    assert "Label: “notes” of music\n" in judged
    assert found.judged("yes", "probably") == [0, 2] and found.judged("no") == []
    with pytest.raises(FastsaeError, match="verdict: got 'maybe'"):
        found.judged("maybe")


def test_a_stopped_run_pays_only_for_the_rest(serve, ex, waits, tmp_path, capsys):
    cache = tmp_path / "answers.jsonl"
    server = serve("ok", "ok", "ok", 500)
    with pytest.raises(FastsaeError, match="run again to continue"):
        label_features(ex, Endpoint(server.url, "m", retries=0), range(F), cache=cache)
    with open(cache, "a") as file:
        file.write('{"key": "cut')  # the process died while it wrote
    before = len(server.requests)
    again = label_features(
        ex,
        Endpoint(server.url, "m", retries=0),
        range(F),
        cache=cache,
        prices=(1.0, 10.0),
        progress=True,
    )
    assert len(again) == F
    total = len(server.requests)
    assert total == 2 * F + 1  # nothing was asked twice but the question that failed
    new = total - before
    told = f"6 of 6 features, 0:00:00 left, {104 * new:,} tokens, {140 * new / 1e6:.4f} spent"
    assert told in capsys.readouterr().err
    assert label_features(ex, Endpoint(server.url, "m"), range(F), cache=cache) == again
    assert len(server.requests) == total
    label_features(ex, Endpoint(server.url, "another"), [0], cache=cache)
    assert len(server.requests) == total + 2  # another model's answers are its own
    cache.write_text("nonsense\n")
    with pytest.raises(FastsaeError, match="line 1: not an answer"):
        label_features(ex, Endpoint(server.url, "m"), range(F), cache=cache)


def test_files(tmp_path):
    found = Labels("abc", {3: labels.Label("naïve \u2028 text", "no", "m")})
    found[1] = labels.Label("", None, "m")
    path = found.save(tmp_path / "x.labels.jsonl")
    again = Labels.load(path)
    assert again == found and again.digest == "abc"
    for content, says in (("", "not a file"), ("{}\n", "holds no labels"), ("{", "not a file")):
        path.write_text(content)
        with pytest.raises(FastsaeError, match=says):
            Labels.load(path)
    with pytest.raises(FastsaeError, match="cannot be read"):
        Labels.load(tmp_path / "none")


class Letters:
    """A tokenizer of single characters."""

    pad_token_id, eos_token_id, chat_template = 0, 0, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) % 64 for c in text]}

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(64 + int(i) % 32) for i in ids)


@torch.no_grad()
def test_a_local_model_answers_with_the_most_probable_option():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    local, letters = LocalModel(model, Letters(), "tiny"), Letters()
    options = ("yes", "probably", "no")
    ids = letters("hello")["input_ids"]

    def mean(option):
        tail = letters(" " + option)["input_ids"]
        rows = model(torch.tensor([ids + tail])).logits[0].log_softmax(-1)
        return sum(float(rows[len(ids) - 1 + i, t]) for i, t in enumerate(tail)) / len(tail)

    reply = Cached(local).complete(ASK, 5, options)
    assert reply.text == max(options, key=mean) and reply.prompt_tokens == 5
    assert len(local.complete(ASK, 3).text) <= 3 and local.complete(ASK, 3).completion_tokens <= 3
