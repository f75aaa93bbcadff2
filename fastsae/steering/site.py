"""One SAE at one hook point: which policy every batch row has, and applying them to a residual."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops.steer import steer
from fastsae.ops.watch import watch_
from fastsae.places import Place
from fastsae.sae import SAE
from fastsae.steering import tokens
from fastsae.steering.dose import Dose, clamp, relative_change
from fastsae.steering.membership import StagedPolicy, is_staged
from fastsae.steering.policy import Policy
from fastsae.steering.positions import Where
from fastsae.steering.scratch import Output
from fastsae.steering.table import Capacity, PolicyTable, keep_address
from fastsae.steering.trace import Trace
from fastsae.steering.transcoder import check_policy, is_transcoder, joined
from fastsae.steering.watch import Watch

# In a packed forward all requests are in one row: where one has NaN keys or values, attention gives
# NaN to all. Elements of a steered residual up to this square to numbers that later norms can add.
LARGEST = 1e16


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

    @property
    def steered(self) -> tuple:
        """(policy digest, strength) of every row, None for a row without a policy."""
        pairs = zip(self.policies, self.strengths, strict=True)
        return tuple(None if policy is None else (policy.digest, s) for policy, s in pairs)


class Site:
    """Applies `rows` to the residual of one hook point; not to be called while not `active`.

    Per row it keeps columns [rows, 1]; a `set` of as many rows only changes their contents.
    """

    def __init__(
        self,
        sae: SAE,
        capacity: Capacity,
        device: torch.device,
        first_token: bool,
        dose: Dose | None = None,
        watch: bool = False,
    ):
        self.sae, self.dose = sae, dose
        self.transcodes = is_transcoder(sae.config)
        self.reads: Place | None = None  # where a transcoder's input passes
        self.watch: Watch | None = None
        if watch and self.transcodes:
            raise FastsaeError(
                "watch: a transcoder's activations are of its input and its dose of its output, "
                "which are not added up together; attach it with watch=False"
            )
        if watch:
            self.watch = Watch(sae, policies=capacity.max_policies, device=device)
        self.also: dict[str, tuple[int, ...]] = {}  # by digest: more features to watch
        self._watched: list[Policy] = []
        self.trace: Trace | None = None
        self.largest_dose = 0.0
        self.table = PolicyTable(sae, capacity=capacity, device=device, transcoders=True)
        self.first_token = first_token
        self.rows = Rows()
        self.active = self.in_table = self.table_only = self.phased = self.demanded = False
        self.staged: list[tuple[StagedPolicy, list[int]]] = []
        self.calls = 0  # forwards that ran this site's Python; a compiled graph does not count
        self._acquired: list[Policy] = []
        self.slots = self.strengths = self.lengths = self.has_policy = self.counts = None
        self.on_prompt = self.on_generated = self.watch_slots = None
        self.forwards: Tensor | None = None  # [1, 1] that applied a required policy, ever
        self.output = Output()
        self.nobody = self.no_slot = None  # [1, 1] zeros for tokens that are not steered
        self.one: Tensor | None = None

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
            if policy is not None and self.transcodes:
                check_policy(policy)
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
        if self.watch is not None:
            watched = self._acquire_watch({policy.digest: policy for policy in used})
            each = [0 if policy is None else watched[policy.digest] for policy in rows.policies]
            self.watch_slots = self._fill(self.watch_slots, each, torch.int32)
        phases = [policy.phase if policy is not None else "all" for policy in rows.policies]
        self.slots = self._fill(self.slots, slots, torch.int32)
        has_policy = [policy is not None for policy in rows.policies]
        self.has_policy = self._fill(self.has_policy, has_policy, torch.int64)  # 0 or 1
        self.counts = self._fill(self.counts, [0] * len(has_policy), torch.int64)
        if self.forwards is None:
            self.forwards, self.nobody, self.one = (
                self._fill(None, [number], torch.int64) for number in (0, 0, 1)
            )
            self.no_slot = self._fill(None, [0], torch.int32)
        self.largest_dose = 0.0
        self.strengths = self._fill(self.strengths, rows.strengths, torch.float32)
        self.on_prompt = self._fill(self.on_prompt, [p != "generated" for p in phases], torch.bool)
        self.on_generated = self._fill(
            self.on_generated, [p != "prompt" for p in phases], torch.bool
        )
        self.lengths = self._fill(self.lengths, rows.lengths, torch.int64)
        self.in_table = any(slots)
        others = self.staged or self.transcodes or self.dose or self.watch
        self.table_only = self.in_table and not others
        self.phased = any(policy.phase != "all" for policy in used)
        self.active = bool(used)
        self.demanded = any(policy.required for policy in used)
        self.rows = rows

    def _release(self) -> None:
        while self._acquired:
            self.table.release(self._acquired.pop())
        while self.staged:
            self.staged.pop()[0].release()
        while self._watched:
            self.watch.release(self._watched.pop())

    def _acquire_watch(self, used: dict[str, Policy]) -> dict[str, int]:
        slots = {}
        for digest, policy in sorted(used.items(), key=lambda each: each[1] not in self.watch):
            slots[digest] = self.watch.acquire(policy, self.also.get(digest, ()))
            self._watched.append(policy)
        return slots

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
        self.table = PolicyTable(
            self.sae, capacity=self.table.capacity, device=device, transcoders=True
        )
        kept, largest = (self.counts, self.forwards), self.largest_dose
        self.slots = self.strengths = self.lengths = self.has_policy = self.counts = None
        self.on_prompt = self.on_generated = self.watch_slots = self.forwards = None
        if self.watch is not None:
            self.watch.move(device)
        self._take(self.rows)
        self.largest_dose = largest
        if kept[0].device.type != "meta" and device.type != "meta":
            self.counts.copy_(kept[0])
            self.forwards.copy_(kept[1])

    def read(self, x: Tensor, where: Where) -> None:
        """Keep a transcoder's input [B, T, d_in] until its output comes: a copy, lest it change."""
        if x.dim() != 3 or x.shape[-1] != self.sae.config.d_in:
            raise FastsaeError(
                f"sae: this transcoder reads [batch, tokens, {self.sae.config.d_in}], but "
                f"{self.reads} carries {list(x.shape)}; take one trained on this model"
            )
        where.inputs.append((self, x.detach().clone()))

    def _input(self, y: Tensor, where: Where) -> Tensor:
        for site, x in where.inputs:
            if site is self and x.shape[:2] == y.shape[:2]:
                return x
        raise FastsaeError(
            f"sae: this transcoder's input never passed at {self.reads} before its output, "
            f"{list(y.shape)}; check config.hook_name and config.hook_name_out"
        )

    def apply(self, residual: Tensor, where: Where) -> Tensor:
        """The steered residual [B, T, D]: a new tensor, rows and tokens without a policy copied."""
        self._check(residual, where)
        written = residual
        if self.transcodes:
            residual = joined(self._input(written, where), written)
        if not torch.compiler.is_compiling():
            self.calls += 1
        rows = self._rows_of(residual, where)
        if self.table_only and not where.packed:
            out = tokens.steered(self, residual, where)
            if out is not None:
                if self.demanded:
                    self.forwards.add_(self.one)  # of a number torch would make a tensor
                return out
        chosen = where.steered(residual, self.first_token)  # a buffer: good for this call only
        if self.phased:
            chosen = self._in_phase(chosen, residual, rows, where)
        if where.packed:  # a token for a row
            first = where.positions(residual)[0] == 0
            residual, chosen = residual.transpose(0, 1), chosen.transpose(0, 1)
        shape, device = residual.shape[:2], residual.device
        strengths = _of(self.strengths, rows).expand(shape)
        if not strengths.is_contiguous():
            buffer = where.scratch("strengths", shape, strengths.dtype, device)
            strengths = strengths.contiguous() if buffer is None else buffer.copy_(strengths)
        chosen, has_policy = chosen.expand(shape), _of(self.has_policy, rows)
        if where.packed or self.staged or self.dose is not None or self.watch is not None:
            chosen = chosen & has_policy.bool()

        def of(chosen: Tensor, name: str, column: Tensor, nothing: Tensor) -> Tensor:
            # All of one type: torch would make a copy of what has another.
            buffer = where.scratch(name, shape, column.dtype, device)
            return torch.where(chosen, column, nothing, out=buffer)

        out = residual
        if self.in_table:
            slots = of(chosen, "slots", _of(self.slots, rows), self.no_slot)
            out = steer(residual, slots, strengths, self.table.buffers)
        for policy, steered in self.staged:
            out = self._apply_staged(policy, steered, rows, out, chosen, strengths)
        if self.transcodes:
            out = out[..., self.sae.config.d_in :].to(written.dtype).contiguous()
        before = written.transpose(0, 1) if where.packed else written
        ran, broken = chosen, None
        if where.packed:
            broken = chosen & ~_usable(before, out)
            out = torch.where(broken.unsqueeze(-1), before, out)
            chosen = chosen & ~broken
            where.request_of(residual).note(first[0], chosen[:, 0], broken[:, 0])
        self._count(of(chosen, "counted", has_policy, self.nobody), rows, where)
        if self.demanded:
            self.forwards.add_(1)
        if self.dose is not None:
            out = self._within_dose(before, out, chosen)
        if self.watch is not None:
            new = out if broken is None else out.masked_fill(broken.unsqueeze(-1), torch.nan)
            watch_(before, new, ran * _of(self.watch_slots, rows), self.watch.table)
        return out.transpose(0, 1) if where.packed else out

    def _in_phase(self, chosen: Tensor, residual: Tensor, rows, where: Where) -> Tensor:
        """[B, T] bool: the chosen tokens in the phase that their row's policy names."""
        shape = residual.shape[:2]
        buffer = where.scratch("phase", shape, torch.bool, chosen.device)
        known = None if self.lengths is None or where.packed else _of(self.lengths, rows)
        generated = where.generated(residual, known)
        on_prompt, on_generated = _of(self.on_prompt, rows), _of(self.on_generated, rows)
        if where.packed:
            on_prompt, on_generated = on_prompt.transpose(0, 1), on_generated.transpose(0, 1)
        if isinstance(generated, Tensor):
            generated = generated.expand(shape)
            wanted = torch.where(generated, on_generated, on_prompt, out=buffer)
        else:
            wanted = on_generated if generated else on_prompt
        return torch.logical_and(chosen.expand(shape), wanted, out=buffer)

    def _count(self, steered: Tensor, rows: "Tensor | int", where: Where) -> None:
        """Add the steered tokens to each row's count, in the same buffer, graphs included."""
        if isinstance(rows, Tensor):
            self.counts.index_add_(0, rows, steered.sum(1, keepdim=True))
            return
        given = self.counts.shape[0]
        if steered.shape == self.counts.shape:
            self.counts.add_(steered)
            return
        buffer = where.scratch("counts", (given, 1), torch.int64, steered.device)
        self.counts.add_(torch.sum(steered.reshape(given, -1), 1, keepdim=True, out=buffer))

    def _within_dose(self, x: Tensor, r: Tensor, chosen: Tensor) -> Tensor:
        if self.dose.action == "clamp":
            return clamp(x, r, self.dose.limit)
        if torch.compiler.is_compiling():
            raise FastsaeError(
                f'dose: "{self.dose.action}" looks at every forward, and a compiled graph cannot; '
                'use Dose(limit, "clamp")'
            )
        # Others may hold NaN of the model's own, padding for one.
        dose = torch.where(chosen, relative_change(x, r), 0.0)
        most, before = float(dose.max()), self.largest_dose
        self.largest_dose = max(most, before)
        if not most <= self.dose.limit:  # NaN is no dose either
            text = (
                f"dose: a policy moved a token by {most:.3g} times its length, above the limit of "
                f"{self.dose.limit:g}; lower the strength, raise the limit, or clamp"
            )
            if self.dose.action == "refuse":
                raise FastsaeError(text)
            if before <= self.dose.limit:
                warnings.warn(text, stacklevel=2)
        return r

    def _check(self, residual: Tensor, where: Where) -> None:
        if self in where.visited:
            raise FastsaeError(
                "model: the hooked layer ran twice in one forward, and its tokens would be steered "
                "twice; fastsae works on models that run every layer once"
            )
        where.visited.append(self)
        width = self.sae.config.width_out
        if residual.dim() != 3 or residual.shape[-1] != width:
            raise FastsaeError(
                f"sae: reads residuals [batch, tokens, {width}], but the hooked layer gives "
                f"{list(residual.shape)}; take an SAE trained on this model"
            )
        if self.table.device != residual.device:
            self._move(residual.device)

    def _rows_of(self, residual: Tensor, where: Where) -> "Tensor | int":
        """The row of `set` of every row of the forward: [rows] indices, or copies of each row."""
        batch, given = residual.shape[0], self.slots.shape[0]
        if where.packed:
            return where.request_of(residual).rows
        if given in (batch, 1):
            return 1
        scope = where.generation
        if scope is not None and scope.batch == given and batch % given == 0:
            return batch // given  # generate's copies of a row share its policy
        raise FastsaeError(
            f"policies: {given} were set, but the batch has {batch} rows; set one policy (or None) "
            "per row, or a single one for all rows"
        )

    def _apply_staged(self, policy: StagedPolicy, steered, rows, out, chosen, strengths) -> Tensor:
        """`out` with the policy applied to the rows of `set` that have it, and no others."""
        if isinstance(rows, Tensor):
            index = torch.isin(rows, torch.tensor(steered, device=rows.device)).nonzero()[:, 0]
        else:
            copies = out.shape[0] // self.slots.shape[0]
            spread = [row * copies + copy for row in steered for copy in range(copies)]
            index = torch.tensor(spread, device=out.device)
        part = out[index]
        new = policy(part.reshape(-1, part.shape[-1]), strengths[index].reshape(-1))
        part = torch.where(chosen[index].unsqueeze(-1), new.view(part.shape), part)
        return out.index_copy(0, index, part)


def _usable(x: Tensor, r: Tensor) -> Tensor:
    """[...]: tokens whose new residual the rest of the model can compute with.

    max |r_i| ≤ LARGEST and half of what the dtype holds, or no larger than it was; never with NaN.
    """
    limit = min(LARGEST, torch.finfo(r.dtype).max / 2)
    return r.abs().amax(-1) <= x.abs().amax(-1).clamp(min=limit)


def _of(per_row: Tensor, rows: "Tensor | int") -> Tensor:
    """[B or 1, 1]: what the row of `set` behind each row of the forward has."""
    if isinstance(rows, Tensor):
        return per_row.index_select(0, rows)
    return per_row if rows == 1 else per_row.repeat_interleave(rows, 0)
