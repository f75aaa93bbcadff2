"""How a request's next token is drawn, inside a batch of requests that differ in everything.

A request's random numbers depend on its seed and on how many tokens it has drawn, on nothing else:
not on the batch, the order, or a preemption. transformers' batches hand every logits processor the
requests of a step, so one processor draws for all of them and leaves nothing to choose.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

HEAD = 2048  # tokens that hold the nucleus of nearly every distribution


@dataclass(frozen=True)
class Sampling:
    """temperature (0: greedy), then top_k (0: all), then the nucleus top_p, as in generate."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass
class Drawing:
    """How a running request draws, and whether its logits were numbers so far.

    The mark goes with the request: a step that ends after the request has left leaves nothing.
    """

    how: Sampling
    broken: bool = False


def draw(logits: Tensor, how: Sampling, step: int) -> int:
    """The token of one step from float32 logits [V]."""
    if how.temperature == 0:
        return int(logits.argmax())
    scaled = (logits.float() - logits.max()) / how.temperature
    generator = torch.Generator().manual_seed((how.seed * 1_000_003 + step) % 2**63)
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    vocabulary = scaled.numel()
    count = min(how.top_k or vocabulary, vocabulary)
    if count == vocabulary and how.top_p == 1:
        return _invert(scaled.softmax(-1).double().cumsum(-1), u)
    total = (scaled if count == vocabulary else scaled.topk(count).values).logsumexp(-1)
    for size in (min(HEAD, count), count):  # a nucleus is small, and sorting everything is not
        head, tokens = scaled.topk(size)
        shares = (head - total).exp().double()
        cumulative = shares.cumsum(-1)
        if cumulative[-1] >= how.top_p:
            break
    # In descending order, the tokens before which less than top_p had been reached.
    kept = max(1, int((cumulative - shares < how.top_p).sum()))
    return int(tokens[_invert(cumulative[:kept], u)])


def _invert(cumulative: Tensor, u: float) -> int:
    """The first entry whose cumulative probability exceeds u of the whole."""
    at = int(torch.searchsorted(cumulative, u * cumulative[-1], right=True))
    return min(at, cumulative.numel() - 1)


def sampler(requests: dict[str, Drawing]):
    """A logits processor for continuous batches that draws every request's token by `requests`.

    Requests whose logits are not finite are marked as broken: what is drawn for them is nothing.
    """
    from transformers.generation.continuous_batching.cb_logits_processors import (
        ContinuousBatchingLogitsProcessor,
    )

    class Sampler(ContinuousBatchingLogitsProcessor):
        supported_kwargs: ClassVar[dict] = {}
        ignored_kwargs = ()

        def __init__(self):
            self.step: list[tuple[str, int]] = []

        def fill_defaults(self, int32_tensor: Tensor) -> None:
            int32_tensor.zero_()

        def prepare_tensor_args(self, requests_with_new_token) -> Tensor:
            states = [future.state for future in requests_with_new_token]
            self.step = [(s.request_id, drawn(s)) for s in states]
            return torch.zeros(len(states), dtype=torch.int32)

        def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
            for row, (request, step) in zip(scores, self.step, strict=False):
                drawing = requests.get(request)
                if drawing is None:
                    continue  # cancelled meanwhile
                if not bool((row.max() < math.inf) & (row.max() > -math.inf)):  # NaN too
                    drawing.broken = True
                    continue
                if drawing.how.temperature == 0:
                    continue  # the largest logit
                token = draw(row, drawing.how, step)
                row.fill_(-math.inf)
                row[token] = 0.0
            return scores

    return Sampler()


def drawn(state) -> int:
    """Tokens that a request has drawn so far; a preempted one counts them among its prompt."""
    prompt = state._true_initial_tokens or len(state.initial_tokens)
    return len(state.initial_tokens) - prompt + len(state.generated_tokens)
