"""Output side: does adding a feature to the residual make its words more probable?"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.lens import _Head
from fastsae.explain.vocabulary import word_tokens
from fastsae.models import (
    Hook,
    hook_module,
    model_device,
    residual_of,
    with_residual,
)
from fastsae.sae import SAE

_ROWS = 64


class _Reached(Exception):
    """Raised by the hook: the output layer is computed outside, for a few tokens only."""


@torch.no_grad()
def output_effect(
    sae: SAE,
    model,
    tokenizer,
    vocab,
    features: Tensor,
    prompts: Sequence[list[int]],
    hook: Hook,
    *,
    strength: float = 4.0,
) -> tuple[Tensor, float]:
    """Δ[f, v] = mean over prompts of log p(v | prompt, f added) − log p(v | prompt).

    Added is strength·σ·d_f/‖d_f‖ at every position but 0 of the residual at `hook`, d_f the decoder
    row and σ² the mean over tokens and dimensions of the centred squared residual of the prompts.
    p is of the token that `" " + v` begins with, after the prompt's last token.
    prompts: token ids, all of one length. Returns Δ [len(features), V] float32 and the norm added.
    """
    lengths = {len(p) for p in prompts}
    if len(lengths) != 1 or lengths.pop() < 2:
        raise FastsaeError("prompts: give token ids, all of one length of at least 2")
    device = model_device(model)
    ids = torch.tensor(list(prompts), device=device)
    first = torch.tensor([t[0] for t in word_tokens(tokenizer, vocab)], device=device)
    head = _Head(model)
    seen: list[Tensor] = []
    base = _log_p(model, hook, ids, first, head, None, seen)
    residual = seen[0][:, 1:].float().flatten(0, 1)
    sigma = float((residual - residual.mean(0)).square().mean().sqrt())
    norm = strength * sigma
    rows = sae.W_dec.detach()[features.to(sae.W_dec.device)].float().to(device)
    added = norm * torch.nn.functional.normalize(rows, dim=-1)
    out = []
    for part in added.split(max(1, _ROWS // len(ids))):
        delta = part.repeat_interleave(len(ids), 0)
        log_p = _log_p(model, hook, ids.repeat(len(part), 1), first, head, delta, [])
        out.append((log_p.view(len(part), len(ids), -1) - base).mean(1).cpu())
    return torch.cat(out), norm


def _log_p(model, hook: Hook, ids, first, head: _Head, delta, seen: list) -> Tensor:
    """log p of the tokens `first` after the last position: [rows, V] float32."""
    layer, side = hook_module(model, hook)
    last: list[Tensor] = []

    def moved(residual: Tensor) -> Tensor:
        seen.append(residual)
        if delta is None:
            return residual
        changed = residual.clone()
        changed[:, 1:] += delta[:, None].to(residual.dtype)
        return changed

    def before(_module, args, kwargs):
        if args:
            return (moved(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": moved(kwargs["hidden_states"])}

    def after(_module, _args, output):
        return with_residual(output, moved(residual_of(output)))

    def at_head(_module, args):
        last.append(args[0][:, -1])
        raise _Reached

    if side == "input":
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True)]
    else:
        handles = [layer.register_forward_hook(after)]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(at_head))
    try:
        model(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return head.logits(last[0], first) - head.logits(last[0]).logsumexp(-1, keepdim=True)
