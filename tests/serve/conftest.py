"""A server over an engine that is all clockwork, and a tiny random model for the real engine."""

import asyncio
import contextlib
import copy
import json
import logging

import httpx
import pytest
import torch

from fastsae import SAE, SAEConfig, attach
from fastsae.errors import FastsaeError
from fastsae.serve.app import create_app
from fastsae.serve.audit import Audit
from fastsae.serve.policies import PolicyStore
from fastsae.serve.seats import EngineError
from fastsae.serve.state import Settings

END = 3
D, F, LAYER, NEW = 32, 64, 0, 6


class Letters:
    """A tokenizer of one token per character; END is special."""

    chat_template = "a template"

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [ord(c) for c in text]}

    def __len__(self):
        return 0x110000

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(chr(t) for t in tokens if t != END)

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"


class Clockwork:
    """Answers with `script`, a token a beat; a policy turns the text into capitals."""

    eos, context, layers = (END,), 400, (12,)

    def __init__(self):
        self.tokenizer = Letters()
        self.script, self.beat, self.alive = "hello world", 0.0, False
        self.seen, self.cancelled, self.fail = [], [], None
        self.numbers, self.forgotten = {}, []

    def start(self):
        self.alive = True

    def stop(self):
        self.alive = False

    def check(self, entry):
        if max(f for op in entry.policy.operations for f in op.features) >= 100:
            raise FastsaeError("operations[0].features: the SAE has 100 features")

    def counters(self):
        return {}

    def watched(self):
        return self.numbers

    def forget(self, entry):
        self.forgotten.append(entry)

    async def run(self, job):
        self.seen.append(job)
        ended = False
        text = self.script.upper() if job.decision.steered else self.script
        try:
            letters = [*map(ord, text), END][: job.max_tokens]
            for i, letter in enumerate(letters):
                await asyncio.sleep(self.beat)
                if self.fail is not None and i == self.fail:
                    raise EngineError("the model broke")
                ended = i + 1 == len(letters)
                yield letter
        finally:
            if not ended:
                self.cancelled.append(job.id)


def policy(name="shout", version="1", **more):
    operations = [{"op": "add", "features": [1, 2], "strength": 2.0}]
    return {"name": name, "version": version, "operations": operations, **more}


@pytest.fixture
def engine():
    return Clockwork()


@pytest.fixture
def store(engine):
    store = PolicyStore(engine.layers, engine.check)
    store.put(policy())
    return store


@pytest.fixture
def serving(engine, store, tmp_path):
    """`async with serving(**settings) as (client, app)`."""

    @contextlib.asynccontextmanager
    async def serving(explanations=None, with_text=False, **settings):
        settings = Settings(**{"model_name": "m", "admin_keys": ("root",), **settings})
        audit = Audit(tmp_path / "audit.jsonl", with_text=with_text)
        app = create_app(engine, store, settings, audit=audit, explanations=explanations)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with app.router.lifespan_context(app):
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                yield client, app

    return serving


@pytest.fixture
def logged():
    """The messages of the server's log, whatever level a uvicorn that ran before has set it to."""
    messages: list[str] = []
    handler, log = logging.Handler(), logging.getLogger("uvicorn.error")
    handler.emit = lambda record: messages.append(record.getMessage())
    level = log.level
    log.setLevel(logging.WARNING)
    log.addHandler(handler)
    yield messages
    log.removeHandler(handler)
    log.setLevel(level)


@pytest.fixture
def run():
    return asyncio.run


@pytest.fixture
def hang_up():
    async def hang_up(app, body, after):
        """Sends a request by hand and leaves before the answer is whole."""
        sent = asyncio.Event()

        async def receive():
            if not sent.is_set():
                sent.set()
                return {"type": "http.request", "body": json.dumps(body).encode()}
            await asyncio.sleep(after)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
        }
        scope |= {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b""}
        scope |= {"headers": [], "scheme": "http", "server": ("t", 80), "client": ("c", 1)}
        await app(scope | {"root_path": ""}, receive, send)

    return hang_up


@pytest.fixture
def parts():
    """A model, its SAE, and a twin of the model that nobody serves."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=D, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, initializer_range=0.15,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    twin = copy.deepcopy(model)  # the one that is served has hooks, and other attention
    return model, SAE(SAEConfig(D, F, k=8)), twin


@pytest.fixture
def alone(parts):
    """What `generate` writes, one prompt at a time, with a handle of its own."""

    def alone(prompt, given=None, strength=1.0, new=NEW):
        model = parts[2]
        with attach(model, {LAYER: parts[1]}) as handle:
            handle.set(given, strengths=strength)
            ids = torch.tensor([prompt])
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
            )
        return out[0, len(prompt) :].tolist()

    return alone
