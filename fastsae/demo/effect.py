"""Measure what steering does: probability of held-out words while generating, and perplexity."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError


class Sample(NamedTuple):
    """Continuations of the prompts and each word list's next-token probability along the way."""

    texts: list[str]  # the generated continuations, without the prompts
    mass: Tensor  # [rows, lists] mean over the row's generated positions of Σ p(word)
    tokens: Tensor  # [rows, length] prompt and continuation, left-padded
    mask: Tensor  # [rows, length] 1 where there is a token of the row's text
    prompt_width: int

    def rows(self, rows: slice) -> "Sample":
        """The sample of some of the rows."""
        texts, mass, tokens, mask, width = self
        return Sample(texts[rows], mass[rows], tokens[rows], mask[rows], width)


def first_tokens(tokenizer, words: list[str]) -> Tensor:
    """Ids of the tokens that " word" and " Word" begin with: predicting one predicts the word."""
    ids = set()
    for word in words:
        for form in (word, word.capitalize()):
            ids.add(tokenizer(" " + form, add_special_tokens=False).input_ids[0])
    if ids & set(tokenizer(" ", add_special_tokens=False).input_ids):
        raise FastsaeError(f"words: some of {words} begin with a lone space in this tokenizer")
    return torch.tensor(sorted(ids))


@torch.inference_mode()
def sample(model, tokenizer, prompts: list[str], lists: list[Tensor], noise: Tensor) -> Sample:
    """Sample noise.shape[1] tokens after each prompt at temperature 1 and record the words' mass.

    mass[row, j] = mean over steps of Σ_{t ∈ lists[j]} p(t | text so far), p of the model as it
    generates, steered or not. Token = first t with Σ_{u ≤ t} p(u) > noise[row, step], uniform in
    [0, 1): rows with the same noise differ only where their distributions do. The full distribution
    is sampled (no top-k, no top-p). A row that has written its end of text counts no further.
    """
    from transformers import LogitsProcessor, LogitsProcessorList

    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    width, eos = batch.input_ids.shape[1], tokenizer.eos_token_id
    sums, counts = torch.zeros(len(prompts), len(lists)), torch.zeros(len(prompts), 1)

    class Draw(LogitsProcessor):
        """Draws the token itself, much faster than torch.multinomial over 262 144 tokens."""

        def __call__(self, input_ids, scores):
            going = ~(input_ids[:, width:] == eos).any(-1, keepdim=True)
            p = torch.softmax(scores.float(), dim=-1)
            found = torch.stack([p[:, ids].sum(-1) for ids in lists], dim=-1)
            sums.add_(found * going)
            counts.add_(going)
            below = p.cumsum_(-1)
            wanted = noise[:, input_ids.shape[1] - width, None] * below[:, -1:]
            token = torch.searchsorted(below, wanted, right=True).clamp_(max=p.shape[-1] - 1)
            return torch.full_like(scores, -math.inf).scatter_(-1, token, 0.0)

    tokens = model.generate(
        **batch,
        max_new_tokens=noise.shape[1],
        do_sample=False,
        logits_processor=LogitsProcessorList([Draw()]),
        pad_token_id=tokenizer.pad_token_id,
    )
    generated = tokens[:, width:]
    ended = generated == eos
    written = (ended.cumsum(-1) - ended.int() == 0).to(batch.attention_mask.dtype)
    return Sample(
        tokenizer.batch_decode(generated, skip_special_tokens=True),
        sums / counts,
        tokens,
        torch.cat([batch.attention_mask, written], dim=1),
        width,
    )


class Reading(NamedTuple):
    """What a model, steered or not, thinks of given texts at their generated positions."""

    mass: Tensor  # [rows, lists] mean over the row's positions of Σ p(word)
    log_likelihood: Tensor  # [rows] Σ log p of the row's own tokens
    tokens: Tensor  # [rows] number of them


@torch.inference_mode()
def read(model, drawn: Sample, lists: list[Tensor]) -> Reading:
    """One forward over each text as it stands: p is conditioned on the same words in every case."""
    generated = drawn.tokens.shape[1] - drawn.prompt_width
    logits = model(
        input_ids=drawn.tokens,
        attention_mask=drawn.mask,
        position_ids=(drawn.mask.cumsum(1) - 1).clamp(min=0),
        logits_to_keep=generated + 1,
    ).logits[:, :-1]
    written = drawn.mask[:, drawn.prompt_width :].bool()
    target = drawn.tokens[:, drawn.prompt_width :]
    mass, likelihood = [], []
    for row, wanted, keep in zip(logits, target, written, strict=True):
        log_p = row[keep].float().log_softmax(-1)
        mass.append(torch.stack([log_p[:, ids].exp().sum(-1).mean() for ids in lists]))
        likelihood.append(log_p.gather(-1, wanted[keep, None]).sum())
    return Reading(torch.stack(mass), torch.stack(likelihood), written.sum(-1))


def perplexity(reading: Reading) -> float:
    """exp of minus the mean log-likelihood per token over all rows."""
    return math.exp(-float(reading.log_likelihood.sum()) / int(reading.tokens.sum()))
