"""One SAE at one layer of a model that vLLM runs: its buffers, and the hook that applies them.

The hook is there before vLLM traces, captures or warms the model up, so the op is part of its
graph; from then on only the contents of the buffers change.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsae.errors import FastsaeError
from fastsae.ops.residual import MemberTable, steer_residual
from fastsae.ops.steer import SteerTable
from fastsae.ops.watch import WatchTable
from fastsae.sae import SAE
from fastsae.steering.dose import Dose
from fastsae.steering.lower import check_features, fetch_rows, lower
from fastsae.steering.membership import is_staged, stages
from fastsae.steering.policy import Policy
from fastsae.steering.table import Capacity, PolicyTable
from fastsae.steering.vllm.requests import Footprint
from fastsae.steering.vllm.step import Applied, StepRows
from fastsae.steering.watch import Watch

MEMBER_FEATURES = 32  # features of one operation that asks for membership, and of its gate


class SteeredLayer(nn.Module):
    """Buffers for `max_tokens` rows and the policies in use; a submodule of the layer it steers.

    dose: a limit to "warn" of or to "clamp" to. watch: features of each policy to watch, 0 for
    no watching at all.
    """

    def __init__(
        self,
        sae: SAE,
        capacity: Capacity,
        membership: int,
        max_tokens: int,
        device,
        dose: Dose | None = None,
        watch: int = 0,
    ):
        super().__init__()
        self.dose = dose
        self.watch = None
        if watch:
            policies = capacity.max_policies
            self.watch = Watch(sae, policies=policies, features=watch, device=device)
        self._watch_slots: dict[str, int] = {}  # by digest
        self.sae_host = [sae]  # in a list: its weights are not weights of vLLM's model
        self.membership = membership if sae.config.activation == "topk" else 0
        self.table = PolicyTable(sae, capacity=capacity, device=device)
        with torch.inference_mode(False):
            for name, tensor in self.table.buffers._asdict().items():
                self.register_buffer(name, tensor, persistent=False)
            fields = 2 * self.membership + 2 if self.membership else 0
            self.rows = StepRows(max_tokens, fields, bool(watch), device)
            for name, tensor in self.rows.tensors.items():
                self.register_buffer(name, tensor, persistent=False)
            if self.membership:
                for name, tensor in self._members(capacity.max_policies, device).items():
                    self.register_buffer(f"member_{name}", tensor, persistent=False)
            if self.watch is not None:
                for name, tensor in self.watch.table._asdict().items():
                    self.register_buffer(f"watch_{name}", tensor, persistent=False)
                if torch.device(device).type == "cpu":  # a graph has no clock
                    seconds = torch.zeros(capacity.max_policies + 1, dtype=torch.float64)
                    self.register_buffer("seconds", seconds, persistent=False)
        self.applied: dict[str, tuple[Policy, Applied, int]] = {}
        self._eager = self._arguments()
        self._free_members = list(range(capacity.max_policies * max(1, self.membership), 0, -1))
        self._free_finishes = list(range(capacity.max_policies, 0, -1))

    @property
    def sae(self) -> SAE:
        return self.sae_host[0]

    def _members(self, policies: int, device) -> dict[str, Tensor]:
        c, j = self.sae.config, MEMBER_FEATURES
        slots = policies * self.membership + 1
        centre = self.sae.b_dec if c.apply_b_dec_to_input else torch.zeros(c.d_in)
        zeros = torch.zeros
        tensors = {
            "feature": torch.full((slots, j), -1, dtype=torch.int32),
            "alpha": zeros(slots, j),
            "dec": zeros(slots, j, c.d_in),
            "gate_enc": zeros(policies + 1, j, c.d_in),
            "gate_bias": zeros(policies + 1, j),
            "gate_size": torch.ones(policies + 1),
            "gate_above": torch.full((policies + 1,), -torch.inf),
            "norm_preserve": zeros(policies + 1, dtype=torch.int32),
            "W_enc": self.sae.W_enc.detach(),
            "b_enc": self.sae.b_enc.detach(),
            "b_dec": centre.detach().to(self.sae.b_enc.dtype),
        }
        return {name: tensor.to(device) for name, tensor in tensors.items()}

    # --- the graph ------------------------------------------------------------------------------

    def forward(self, hidden: Tensor, residual: Tensor | None) -> None:
        if hidden.is_cpu and not torch.compiler.is_compiling():
            # Python runs in every step, and only then may the host's knowledge decide: on a GPU
            # what runs here may be captured once and replayed.
            if not self.rows.idle:
                steer_residual(hidden, residual, *self._eager)
            return
        torch.ops.fastsae.steer_residual_(hidden, residual, *self._arguments())

    def _arguments(self) -> tuple:
        """What the op takes after hidden and residual, from the buffers."""

        def of(prefix: str, names) -> list[Tensor]:
            return [getattr(self, prefix + name) for name in names]

        watched, sums, maxima, watch = None, None, None, []
        if self.watch is not None:
            *watch, sums, maxima = of("watch_", WatchTable._fields)
            watched = self.watched
        clamped = self.dose is not None and self.dose.action == "clamp"
        return (
            *(self.active, self.slots, self.strengths),
            of("", SteerTable._fields),
            self.stages if self.membership else None,
            of("member_", MemberTable._fields) if self.membership else [],
            self.sae.config.k or 0,
            self.dose.limit if clamped else 0.0,
            *(watched, watch, sums, maxima),
            getattr(self, "seconds", None),
        )

    def hook(self, layer, args, output) -> None:
        """Forward hook of a decoder layer; its output is changed in place."""
        self(*residual_parts(output))

    # --- the policies in use --------------------------------------------------------------------

    def check(self, policy: Policy, also: Sequence[int] = ()) -> Footprint:
        """What the policy would take; a FastsaeError says why this SAE or these buffers cannot.

        also: further features to watch.
        """
        capacity = self.table.capacity
        check_features(self.sae, tuple(also))
        if also and self.watch is None:
            raise FastsaeError("watch: this server watches nothing; set fastsae.watch above 0")
        staged = is_staged(self.sae, policy)
        parts: list = stages(self.sae, policy) if staged else [policy]
        lower(self.sae, policy, membership=staged)
        operations = [part for part in parts if not isinstance(part, Policy)]
        if len(operations) > self.membership:
            raise FastsaeError(
                f"membership: policy {policy.label} has {len(operations)} operations with active="
                f'"sae" on a top-k SAE, this server allows {self.membership}; set "membership" in '
                'the fastsae settings, or use active="relu"'
            )
        gate = policy.gate.features if staged and policy.gate else ()
        for each in [*(operation.features for operation in operations), gate]:
            if len(each) > MEMBER_FEATURES:
                raise FastsaeError(
                    f"features: policy {policy.label} names {len(each)} at once, where a top-k "
                    f"SAE's own activation is asked for at most {MEMBER_FEATURES} work"
                )
        lowered = [lower(self.sae, part) for part in parts if isinstance(part, Policy)]
        rows = frozenset().union(*(each.rows for each in lowered))
        fetch_rows(self.sae, sorted(rows))
        for name, needed in (
            ("max_operations", max([0, *(len(each.steps) for each in lowered)])),
            ("max_policies", len(lowered)),
            ("max_features", len(rows)),
            ("max_items", sum(each.items for each in lowered)),
        ):
            if needed > getattr(capacity, name):
                raise FastsaeError(
                    f"{name}: policy {policy.label} needs {needed}, the buffers hold "
                    f'{getattr(capacity, name)}; set "{name}" in the fastsae settings'
                )
        return Footprint(max(1, len(lowered)), rows, sum(each.items for each in lowered))

    def acquire(self, policy: Policy, also: Sequence[int] = ()) -> Applied:
        policy_, applied, users = self.applied.get(policy.digest, (policy, None, 0))
        if applied is None:
            staged = is_staged(self.sae, policy)
            applied = self._stage(policy) if staged else Applied(self.table.acquire(policy), None)
            if self.watch is not None:
                applied.watch = self._watch(policy, also)
        self.applied[policy.digest] = (policy_, applied, users + 1)
        return applied

    def release(self, policy: Policy) -> None:
        policy, applied, users = self.applied.pop(policy.digest)
        if users > 1:
            self.applied[policy.digest] = (policy, applied, users - 1)
            return
        if self.watch is not None:
            self.watch.release(policy)
        if applied.stages is None:
            self.table.release(policy)
        else:
            self._free_finishes.append(applied.stages[-1])
            self._free_members += [slot for slot in applied.stages[1:-1:2] if slot]
            for part in stages(self.sae, policy):
                if isinstance(part, Policy):
                    self.table.release(part)

    def forget(self, digest: str) -> None:
        """Nobody may name the policy any more: its numbers go, and its slot with its last row."""
        if self.watch is not None:
            self.watch.forget(digest)

    def _watch(self, policy: Policy, also: Sequence[int]) -> int:
        new = policy not in self.watch
        slot = self._watch_slots[policy.digest] = self.watch.acquire(policy, also)
        if new and hasattr(self, "seconds"):
            with torch.inference_mode(False), torch.no_grad():
                self.seconds[slot] = 0
        return slot

    def numbers(self) -> dict[str, dict]:
        """Watch.read, by digest, and `seconds`: what the op took of a CPU, None on a GPU."""
        if self.watch is None:
            return {}
        found = self.watch.read()
        self._watch_slots = {digest: self._watch_slots[digest] for digest in found}
        seconds = self.seconds.tolist() if hasattr(self, "seconds") else None
        for digest, slot in self._watch_slots.items():
            found[digest]["seconds"] = None if seconds is None else seconds[slot]
        return found

    def largest_dose(self, policy: Policy) -> float:
        """‖r − x‖ / ‖x‖, the most so far; infinite if a token came out not finite. Waits."""
        slot = self._watch_slots[policy.digest]
        broken = float(self.watch_sums[slot, 1]) > 0
        return float("inf") if broken else float(self.watch_maxima[slot, 0])

    @torch.inference_mode(False)
    @torch.no_grad()
    def _stage(self, policy: Policy) -> Applied:
        """table, member, table, …, table, finish: stages this policy does not use hold slot 0."""
        numbers, place = [0] * (2 * self.membership + 2), 0
        for part in stages(self.sae, policy):
            if isinstance(part, Policy):
                numbers[place] = self.table.acquire(part)
            else:
                place += 1 if place % 2 == 0 else 2
                numbers[place] = slot = self._free_members.pop()
                rows = fetch_rows(self.sae, [(feature, False) for feature in part.features])
                count = len(part.features)
                self.member_feature[slot].fill_(-1)
                self.member_feature[slot, :count] = torch.tensor(part.features, dtype=torch.int32)
                self.member_alpha[slot].zero_()[:count] = torch.tensor(part.alpha)
                self.member_dec[slot].zero_()[:count] = rows.dec.to(self.member_dec.device)
                place += 1
        numbers[-1] = finish = self._free_finishes.pop()
        self.member_norm_preserve[finish] = int(policy.norm == "preserve")
        self.member_gate_enc[finish] = 0
        self.member_gate_bias[finish] = 0
        self.member_gate_size[finish] = 1
        self.member_gate_above[finish] = -torch.inf
        if policy.gate is not None:
            rows = fetch_rows(self.sae, [(feature, False) for feature in policy.gate.features])
            count = len(policy.gate.features)
            self.member_gate_enc[finish, :count] = rows.enc.to(self.member_gate_enc.device)
            self.member_gate_bias[finish, :count] = rows.bias.to(self.member_gate_bias.device)
            self.member_gate_size[finish] = count
            self.member_gate_above[finish] = policy.gate.above
        return Applied(0, numbers)

    def fill(self, spans: Sequence[tuple[int, int, Applied, float]]) -> None:
        """Rows begin:end of the next forward get a policy and a strength; all others get slot 0."""
        self.rows.fill(spans)


def residual_parts(output) -> tuple[Tensor, Tensor | None]:
    """The tensors whose sum is the residual: (hidden, residual), (hidden, None) or one tensor."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple | list) and len(output) >= 2 and isinstance(output[0], Tensor):
        hidden, residual = output[0], output[1]
        if residual is None or (isinstance(residual, Tensor) and residual.shape == hidden.shape):
            return hidden, residual
    kinds = [type(each).__name__ for each in output] if isinstance(output, tuple | list) else output
    raise FastsaeError(
        f"model: the steered layer returned {kinds}; this plugin knows (hidden, residual), "
        "(hidden, None) and one tensor"
    )
