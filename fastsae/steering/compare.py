"""The same prompt and random numbers, without and with a policy."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.steering.hf import steer
from fastsae.steering.policy import Policy


class _Draw:
    """Leaves one token possible: the first whose cumulative probability is above the row's number.

    Both rows get the same number in [0, 1), so that they differ only where their distributions do.
    """

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        below = torch.softmax(scores.float(), dim=-1).cumsum_(-1)
        number = torch.rand(1, generator=self.random).to(scores.device)
        wanted = number * below[:, -1:]
        token = torch.searchsorted(below, wanted, right=True).clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)


class _Streamer:
    """Hands on both texts so far, after every token that `generate` writes."""

    def __init__(self, tokenizer, tell: Callable[[str, str], None], ends: set[int]):
        self.tokenizer, self.tell, self.ends = tokenizer, tell, ends
        self.tokens: list[list[int]] | None = None

    def put(self, value: Tensor) -> None:
        if self.tokens is None:  # the prompt comes first
            self.tokens = [[], []]
            return
        for tokens, token in zip(self.tokens, value.tolist(), strict=True):
            if not tokens or tokens[-1] not in self.ends:
                tokens.append(token)
        self.tell(*(self.tokenizer.decode(t, skip_special_tokens=True) for t in self.tokens))

    def end(self) -> None:
        pass


@torch.inference_mode()
def compare(
    model,
    tokenizer,
    sae,
    policy: Policy,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    seed: int = 0,
    sample: bool = True,
    strength: float = 1.0,
    layer: int | str | None = None,
    stream: Callable[[str, str], None] | None = None,
) -> tuple[str, str]:
    """(base, steered) continuations of `prompt`, without the prompt. Private random state.

    Both are rows of one batch. sample: at temperature 1 from the full distribution, both rows by
    the same random number per step; else greedy. stream: called after every token with both texts
    so far.
    """
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 1
    ):
        raise FastsaeError(f"max_new_tokens: got {max_new_tokens!r}, expected a positive integer")
    batch = tokenizer([prompt, prompt], return_tensors="pt").to(next(model.parameters()).device)
    if batch.input_ids.shape[1] == 0:
        raise FastsaeError(f"prompt: {prompt!r} has no token in this tokenizer; give some text")
    more = {} if stream is None else {"streamer": _Streamer(tokenizer, stream, _ends(model))}
    with steer(model, sae, [None, policy], layer=layer, strength=strength):
        tokens = model.generate(
            **batch,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            logits_processor=[_Draw(seed)] if sample else [],
            **more,
        )
    base, steered = tokenizer.batch_decode(
        tokens[:, batch.input_ids.shape[1] :], skip_special_tokens=True
    )
    return base, steered


def _ends(model) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(ends) if isinstance(ends, list) else {ends} - {None}
