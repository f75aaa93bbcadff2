"""A site's policies on a forward in one compiled call: on a CPU, for policies of the table alone.

Positions, phases, slots, counts and the steering itself take a dozen torch calls otherwise, and in
the midst of a model each of them finds its code and data out of cache: together they cost more than
the policies. The results are the same, bit for bit.
"""

import torch
from torch import Tensor

from fastsae.ops.backend import direct
from fastsae.ops.native import steer_tokens
from fastsae.steering.positions import Where
from fastsae.steering.scratch import no_scratch


def steered(site, x: Tensor, where: Where) -> Tensor | None:
    """The new residual [B, T, D] of a `Site`; None where the general way has to be taken."""
    if direct("steer", None, x) is None or not x.is_contiguous():
        return None
    place = where.columns(x)
    if place is None:
        return None
    lengths, generated = None, False  # what all are where no length says it
    if site.phased:
        lengths = where.lengths() if site.lengths is None else site.lengths
        if lengths is None:
            if where.generation is not None:
                return None  # positions will tell, once
            generated = where.after_prompt()
    x = x.detach() if x.requires_grad else x
    out = torch.empty_like(x) if where.scratch is no_scratch else site.output(x)
    rows = site.slots, site.strengths, site.on_prompt, site.on_generated, lengths
    first, table = (0 if site.first_token else 1), list(site.table.buffers)
    try:
        steer_tokens(x, *place, first, *rows, generated, site.counts, out, table)
    except (RuntimeError, TypeError):
        return None  # a type that it does not take: nothing was counted yet
    return out.view(x.shape)  # a tensor of its own: see Output
