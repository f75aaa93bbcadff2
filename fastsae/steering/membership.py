"""Policies that ask a top-k SAE for its own activation: is the feature among the k largest?

That takes a whole encode of the residual as the operation finds it, so such a policy runs in parts:
the operations between two of these go through the steer op like any other.
"""

import torch
from torch import Tensor

from fastsae.ops.decode import decode, gather_dot
from fastsae.ops.steer import steer
from fastsae.sae import SAE
from fastsae.steering.lower import fetch_rows, lower, needs_membership
from fastsae.steering.policy import Amplify, Gate, Operation, Policy
from fastsae.steering.table import PolicyTable


def is_staged(sae: SAE, policy: Policy) -> bool:
    """Whether an operation of the policy needs top-k membership in this SAE."""
    return any(needs_membership(sae, operation) for operation in policy.operations)


def stages(sae: SAE, policy: Policy) -> list[Policy | Amplify]:
    """The policy's operations in order, those the steer op can do at once grouped into policies."""
    parts: list[Policy | Amplify] = []
    plain: list[Operation] = []
    for operation in policy.operations:
        if not needs_membership(sae, operation):
            plain.append(operation)
            continue
        parts += [Policy(plain), operation] if plain else [operation]
        plain = []
    return parts + [Policy(plain)] if plain else parts


def _every(rows: Tensor, x: Tensor) -> Tensor:
    """[N, R] int32: all R rows for each row of x, as our ops (exact under autocast) want them."""
    every = torch.arange(rows.shape[0], dtype=torch.int32, device=x.device)
    return every.expand(x.shape[0], -1)


class _Members:
    """amplify over the features that are among the k largest: r + σ Σ α_s a_s d_s."""

    def __init__(self, sae: SAE, operation: Amplify, device: torch.device):
        rows = fetch_rows(sae, [(feature, False) for feature in operation.features])
        self.sae = sae
        self.features = torch.tensor(operation.features, dtype=torch.int32, device=device)
        self.alpha = torch.tensor(operation.alpha, device=device)
        self.dec = rows.dec.to(device)

    def __call__(self, r: Tensor, strengths: Tensor) -> Tensor:
        z = self.sae.encode(r[:, : self.sae.config.d_in])  # a transcoder's row is [input, output]
        member = z.indices.unsqueeze(-1) == self.features  # [N, k, features]
        acts = torch.where(member, z.values.unsqueeze(-1), 0).sum(-2)
        coefficient = self.alpha.to(r.dtype) * acts.to(r.dtype)
        delta = decode(coefficient, _every(self.dec, r), self.dec.to(r.dtype))
        return r + strengths.to(r.dtype).unsqueeze(-1) * delta


class _Gate:
    def __init__(self, sae: SAE, gate: Gate, device: torch.device):
        rows = fetch_rows(sae, [(feature, False) for feature in gate.features])
        self.enc, self.bias, self.above = rows.enc.to(device), rows.bias.to(device), gate.above

    def __call__(self, x: Tensor) -> Tensor:
        h = gather_dot(x, self.enc.to(x.dtype), _every(self.enc, x)) + self.bias.to(x.dtype)
        return h.relu().mean(-1, keepdim=True) >= self.above


class StagedPolicy:
    """One such policy, ready to run on rows of a residual. Same results as the op's definition."""

    def __init__(self, table: PolicyTable, policy: Policy):
        lower(table.sae, policy, membership=True)  # the errors name the operation's own index
        self.table = table
        self.norm_preserve = policy.norm == "preserve"
        self.gate = policy.gate and _Gate(table.sae, policy.gate, table.device)
        self.parts: list[int | _Members] = []
        self._acquired: list[Policy] = []
        try:
            for part in stages(table.sae, policy):
                if isinstance(part, Policy):
                    self.parts.append(table.acquire(part))
                    self._acquired.append(part)
                else:
                    self.parts.append(_Members(table.sae, part, table.device))
        except Exception:
            self.release()
            raise

    def release(self) -> None:
        """Give the slots of the parts back."""
        while self._acquired:
            self.table.release(self._acquired.pop())

    @torch.no_grad()
    def __call__(self, x: Tensor, strengths: Tensor) -> Tensor:
        """x [N, D], strengths [N] float32 -> new [N, D] of x's dtype, computed in fp32 or fp64."""
        start = x.to(torch.promote_types(x.dtype, torch.float32))
        r = start
        for part in self.parts:
            if isinstance(part, int):
                slots = torch.full_like(strengths, part, dtype=torch.int32)
                r = steer(r, slots, strengths, self.table.buffers)
            else:
                r = part(r, strengths)
        if self.norm_preserve:
            before, after = start.norm(dim=-1, keepdim=True), r.norm(dim=-1, keepdim=True)
            r = torch.where(after > 0, r * (before / after), r)
        r = r.to(x.dtype)
        return r if self.gate is None else torch.where(self.gate(start), r, x)
