"""Policies, prompts and jobs for the engine over a real (tiny, random) model."""

import pytest

from fastsae import Policy, add
from fastsae.serve.engine import Engine
from fastsae.serve.sampling import Sampling
from fastsae.serve.seats import Job
from fastsae.steering.control import Decision

LAYER, NEW = 0, 6
PROMPTS = [[5, 6, 7, 8], [4, 5, 6, 7, 8, 9], [9, 8, 7, 6, 3], [11, 12, 13]]


class Numbers:
    """A tokenizer whose words are the numbers of its tokens."""

    chat_template = None

    def __len__(self):
        return 97

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(f" {token}" for token in tokens)


def policy(name, features, strength=4.0, **more):
    return Policy([add(features, strength)], name=name, version="1", **more)


POLICIES = [
    policy("a", [1, 2]),
    policy("b", [3], phase="generated"),
    policy("c", [4, 5], phase="prompt", required=True),
    policy("d", [6], -6.0, norm="preserve"),
]


@pytest.fixture
def engine(parts):
    engine = Engine(parts[0], Numbers(), {LAYER: parts[1]}, cache_tokens=2048, max_policies=8)
    engine.start()
    yield engine
    engine.stop()


def job(prompt, entry=None, strength=1.0, new=NEW, how=None):
    reason = "none" if entry is None else "steered"
    decision = Decision(entry, strength, reason)
    return Job(tuple(prompt), new, how or Sampling(0.0), decision)


async def answer(engine, each):
    return [token async for token in engine.run(each)]
