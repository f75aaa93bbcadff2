"""Measure what steering does: probability of held-out words while generating, and perplexity."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError


class Sample(NamedTuple):
    """Continuations of the prompts and each word list's next-token probability along the way."""

    texts: list[str]  # the generated continuations, without the prompts
    mass: dict[str, float]  # mean over rows and generated positions of Σ p(word), per list
    tokens: Tensor  # [rows, length] prompt and continuation, left-padded
    mask: Tensor  # [rows, length] 1 where there is a token
    prompt_width: int


def first_tokens(tokenizer, words: list[str]) -> Tensor:
    """Ids of the tokens that " word" and " Word" begin with: predicting one predicts the word."""
    ids = set()
    for word in words:
        for form in (word, word.capitalize()):
            pieces = tokenizer(" " + form, add_special_tokens=False).input_ids
            ids.add(pieces[0])
    blank = set(tokenizer(" ", add_special_tokens=False).input_ids)
    if ids & blank:
        raise FastsaeError(f"words: some of {words} begin with a lone space in this tokenizer")
    return torch.tensor(sorted(ids))


@torch.inference_mode()
def sample(
    model,
    tokenizer,
    prompts: list[str],
    word_ids: dict[str, Tensor],
    *,
    new_tokens: int,
    seed: int,
    steering: contextlib.AbstractContextManager | None = None,
) -> Sample:
    """Sample `new_tokens` tokens after each prompt at temperature 1 and record the words' mass.

    mass[name] = mean over rows and steps of Σ_{t ∈ word_ids[name]} p(t | text so far), p of the
    model as it generates, steered or not. The full distribution is sampled (no top-k, no top-p), so
    that p is what is recorded. The random state is private to the call.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    class Recorder(LogitsProcessor):
        def __init__(self):
            self.sums = dict.fromkeys(word_ids, 0.0)
            self.steps = 0

        def __call__(self, input_ids, scores):
            log_total = scores.float().logsumexp(-1, keepdim=True)
            for name, ids in word_ids.items():
                p = (scores[:, ids].float() - log_total).exp().sum(-1)
                self.sums[name] += float(p.mean())
            self.steps += 1
            return scores

    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    recorder = Recorder()
    with torch.random.fork_rng(devices=[]), steering or contextlib.nullcontext():
        torch.manual_seed(seed)
        tokens = model.generate(
            **batch,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            logits_processor=LogitsProcessorList([recorder]),
            pad_token_id=tokenizer.pad_token_id,
        )
    width = batch.input_ids.shape[1]
    mask = torch.cat([batch.attention_mask, torch.ones_like(tokens[:, width:])], dim=1)
    texts = tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    mass = {name: total / recorder.steps for name, total in recorder.sums.items()}
    return Sample(texts, mass, tokens, mask, width)


@torch.inference_mode()
def perplexity(model, drawn: Sample) -> float:
    """exp of the mean negative log-likelihood of the generated tokens under the unsteered model."""
    positions = (drawn.mask.cumsum(1) - 1).clamp(min=0)
    generated = drawn.tokens.shape[1] - drawn.prompt_width
    logits = model(
        input_ids=drawn.tokens,
        attention_mask=drawn.mask,
        position_ids=positions,
        logits_to_keep=generated + 1,
    ).logits[:, :-1]
    target = drawn.tokens[:, drawn.prompt_width :]
    loss = 0.0
    for row, wanted in zip(logits, target, strict=True):
        loss += float(torch.nn.functional.cross_entropy(row.float(), wanted, reduction="sum"))
    return math.exp(loss / target.numel())
