"""One SAE at one hook point: which policy every batch row has, and applying them to a residual."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops.steer import steer
from fastsae.sae import SAE
from fastsae.steering.membership import StagedPolicy, is_staged
from fastsae.steering.policy import Policy
from fastsae.steering.positions import Where
from fastsae.steering.table import Capacity, PolicyTable, keep_address


class Rows:
    """What `set` was given: a policy (or None) and a strength per row, prompt lengths or None."""

    def __init__(
        self,
        policies: Sequence[Policy | None] = (),
        strengths: Sequence[float] = (),
        lengths: Sequence[int] | None = None,
    ):
        # Strength 0 is no policy: the row must come out bit-identical, rescaling included.
        pairs = zip(policies, strengths, strict=True)
        self.policies = tuple(policy if strength else None for policy, strength in pairs)
        self.strengths = tuple(strengths)
        self.lengths = lengths


class Site:
    """Applies `rows` to the residual of one hook point; not to be called while not `active`.

    Per row it keeps columns [rows, 1]; a `set` of as many rows only changes their contents.
    """

    def __init__(self, sae: SAE, capacity: Capacity, device: torch.device, first_token: bool):
        self.sae = sae
        self.table = PolicyTable(sae, capacity=capacity, device=device)
        self.first_token = first_token
        self.rows = Rows()
        self.active = self.in_table = self.phased = False
        self.staged: list[tuple[StagedPolicy, list[int]]] = []
        self.calls = 0  # forwards that ran this site's Python; a compiled graph does not count
        self._acquired: list[Policy] = []
        self.slots = self.strengths = self.lengths = None
        self.on_prompt = self.on_generated = None

    @property
    def required(self) -> list[Policy]:
        return [policy for policy in self.rows.policies if policy is not None and policy.required]

    def set(self, rows: Rows) -> None:
        """Replace the rows; when that raises they stay as they were."""
        before = self.rows
        self._release()  # what was packed stays packed until its room is needed
        try:
            self._take(rows)
        except Exception:
            self._release()
            self._take(before)
            raise

    @torch.inference_mode(False)  # an inference tensor could not be updated outside such a block
    @torch.no_grad()
    def _take(self, rows: Rows) -> None:
        slots, staged = [], {}
        for row, policy in enumerate(rows.policies):
            slot = 0
            if policy is not None and is_staged(self.sae, policy):
                if policy.digest not in staged:
                    staged[policy.digest] = (StagedPolicy(self.table, policy), [])
                    self.staged.append(staged[policy.digest])
                staged[policy.digest][1].append(row)
            elif policy is not None:
                slot = self.table.acquire(policy)
                self._acquired.append(policy)
            slots.append(slot)
        used = [policy for policy in rows.policies if policy is not None]
        phases = [policy.phase if policy is not None else "all" for policy in rows.policies]
        self.slots = self._fill(self.slots, slots, torch.int32)
        self.strengths = self._fill(self.strengths, rows.strengths, torch.float32)
        self.on_prompt = self._fill(self.on_prompt, [p != "generated" for p in phases], torch.bool)
        self.on_generated = self._fill(
            self.on_generated, [p != "prompt" for p in phases], torch.bool
        )
        self.lengths = self._fill(self.lengths, rows.lengths, torch.int64)
        self.in_table = any(slots)
        self.phased = any(policy.phase != "all" for policy in used)
        self.active = bool(used)
        self.rows = rows

    def _release(self) -> None:
        while self._acquired:
            self.table.release(self._acquired.pop())
        while self.staged:
            self.staged.pop()[0].release()

    def _fill(self, old: Tensor | None, values, dtype: torch.dtype) -> Tensor | None:
        if values is None:
            return None
        new = torch.tensor(values, dtype=dtype).unsqueeze(1)
        if old is None or old.shape != new.shape:
            return keep_address(new.to(self.table.device))
        return old.copy_(new)

    def _move(self, device: torch.device) -> None:
        """Follow a layer that was not where its residual is now when we attached (offloading)."""
        self._release()
        self.table = PolicyTable(self.sae, capacity=self.table.capacity, device=device)
        self.slots = self.strengths = self.lengths = None
        self.on_prompt = self.on_generated = None
        self._take(self.rows)

    def apply(self, residual: Tensor, where: Where) -> Tensor:
        """The steered residual [B, T, D]: a new tensor, rows and tokens without a policy copied."""
        self._check(residual)
        if not torch.compiler.is_compiling():
            self.calls += 1
        batch, tokens = residual.shape[:2]
        chosen = where.steered(residual, self.first_token)
        if self.phased:
            known = None if self.lengths is None else self._spread(self.lengths, batch, where)
            generated = where.generated(residual, known)
            on_prompt = self._spread(self.on_prompt, batch, where)
            on_generated = self._spread(self.on_generated, batch, where)
            if isinstance(generated, Tensor):
                chosen = chosen & torch.where(generated, on_generated, on_prompt)
            else:
                chosen = chosen & (on_generated if generated else on_prompt)
        strengths = self._spread(self.strengths, batch, where).expand(batch, tokens).contiguous()
        out = residual
        if self.in_table:
            slots = chosen * self._spread(self.slots, batch, where)
            out = steer(residual, slots, strengths, self.table.buffers)
        if self.staged:
            chosen = chosen.expand(batch, tokens)
        for policy, rows in self.staged:
            out = self._apply_staged(policy, rows, out, chosen, strengths)
        return out

    def _check(self, residual: Tensor) -> None:
        width = self.sae.config.d_in
        if residual.dim() != 3 or residual.shape[-1] != width:
            raise FastsaeError(
                f"sae: reads residuals [batch, tokens, {width}], but the hooked layer gives "
                f"{list(residual.shape)}; take an SAE trained on this model"
            )
        if self.table.device != residual.device:
            self._move(residual.device)

    def _spread(self, per_row: Tensor, batch: int, where: Where) -> Tensor:
        """[batch, 1], an entry per row of the forward; generate's copies of a row share its own."""
        given = per_row.shape[0]
        if given == batch:
            return per_row
        if given == 1:
            return per_row.expand(batch, 1)
        scope = where.generation
        if scope is not None and scope.batch == given and batch % given == 0:
            return per_row.repeat_interleave(batch // given, 0)
        raise FastsaeError(
            f"policies: {given} were set, but the batch has {batch} rows; set one policy (or None) "
            "per row, or a single one for all rows"
        )

    def _apply_staged(self, policy: StagedPolicy, rows, out, chosen, strengths) -> Tensor:
        """`out` with the policy applied to its batch rows only."""
        copies = out.shape[0] // self.slots.shape[0]
        spread = [row * copies + copy for row in rows for copy in range(copies)]
        index = torch.tensor(spread, device=out.device)
        part = out[index]
        new = policy(part.reshape(-1, part.shape[-1]), strengths[index].reshape(-1))
        part = torch.where(chosen[index].unsqueeze(-1), new.view(part.shape), part)
        return out.index_copy(0, index, part)
