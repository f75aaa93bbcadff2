"""What steering did to each policy's tokens: gates, features and doses, added up on the device.

Both engines fill it in their forward (fastsae.ops.watch.watch_) and read it when somebody asks.
"""

from collections.abc import Sequence
from typing import Any

import torch

from fastsae.errors import FastsaeError
from fastsae.ops.watch import WatchTable
from fastsae.sae import SAE
from fastsae.steering.lower import check_features, fetch_rows
from fastsae.steering.policy import Policy
from fastsae.steering.table import keep_address

FEATURES = 32


class _Resident:
    def __init__(self, slot: int, policy: Policy, watched: tuple[int, ...], left: tuple[int, ...]):
        self.slot, self.policy, self.watched, self.left = slot, policy, watched, left
        self.users = 0

    @property
    def named(self) -> tuple[int, ...]:
        return self.watched + self.left


class Watch:
    """Slots of a WatchTable, keyed by policy digest; slot 0 is for rows that nobody watches.

    A policy's numbers stay from its first `acquire` until `forget`, or until its slot is needed
    while no row has it; whoever gets the slot then begins at 0. The buffers (`table`) never
    move and take policies · features · d_in · 4 bytes. Not thread-safe: the host's writes
    (`acquire`, `forget`) belong between two forwards; a `read` during one may be a part of it off.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        policies: int = 64,
        features: int = FEATURES,
        device: torch.device | str = "cpu",
    ):
        self.sae, self.policies, self.features = sae, policies, features
        self._residents: dict[str, _Resident] = {}  # least recently acquired first
        self._free = list(range(policies, 0, -1))
        slots, d_in = policies + 1, sae.config.d_in
        with torch.inference_mode(False):  # an inference tensor could not be updated later
            tensors = {
                "enc": torch.zeros(slots, features, d_in),
                "bias": torch.zeros(slots, features),
                "floor": torch.zeros(slots, features),
                "gate": torch.zeros(slots, features),
                "above": torch.full((slots,), -torch.inf),
                "count": torch.zeros(slots, dtype=torch.int32),
                "sums": torch.zeros(slots, 4 + features, dtype=torch.float64),
                "maxima": torch.zeros(slots, 1 + features),
            }
            moved = {name: keep_address(t.to(device)) for name, t in tensors.items()}
            self.table = WatchTable(**moved)

    def __contains__(self, policy: Policy) -> bool:
        return policy.digest in self._residents

    def acquire(self, policy: Policy, also: Sequence[int] = ()) -> int:
        """The policy's slot for rows that have it; every `acquire` needs a `release`.

        Watched are the features of its gate, of its operations and `also`, in this order, the
        first `features` of them; `read` names the others. A policy without a user that comes back
        with another `also` begins at 0. When every slot has a user: FastsaeError, and nothing
        changed. Acquire policies that are `in` the watch first: others may take the slot of one
        that has no user.
        """
        named = self._named(policy, also)
        resident = self._residents.get(policy.digest)
        if resident is not None and not resident.users and resident.named != named:
            self.forget(policy.digest)
            resident = None
        if resident is None:
            resident = self._enter(policy, named)
        self._residents.pop(policy.digest, None)
        self._residents[policy.digest] = resident  # now the most recently used
        resident.users += 1
        return resident.slot

    def release(self, policy: Policy) -> None:
        """One user of the policy less; its numbers stay."""
        resident = self._residents[policy.digest]
        assert resident.users > 0, "release without acquire"
        resident.users -= 1

    def forget(self, digest: str) -> None:
        """The policy has left: its numbers go, and its slot when no row has it any more.

        While rows still have it they count from 0. An unknown digest is nobody's: no error.
        """
        resident = self._residents.get(digest)
        if resident is None:
            return
        self._clear(resident.slot)
        if not resident.users:
            del self._residents[digest]
            self._free.append(resident.slot)

    def move(self, device: torch.device) -> None:
        """Puts the buffers on another device, numbers included; graphs of them are void then."""
        with torch.inference_mode(False):
            moved = (keep_address(t.to(device)) for t in self.table)
            self.table = WatchTable(*moved)

    def read(self) -> dict[str, dict[str, Any]]:
        """{digest: numbers since the policy came}; waits for the device.

        | key | |
        |---|---|
        | policy | its label |
        | tokens, not_finite | steered tokens; those of not finite norms, counted nowhere else |
        | gate | None, or {opened, closed}: tokens; {} where the gate has features left out |
        | features | {feature: {sum, max}} of its activation a before steering |
        | left_out | features of the policy that are not watched: more than the buffers hold |
        | dose | {sum, max} of ‖r − x‖ / ‖x‖ |

        Means are sum / tokens: a token whose gate was closed counts, with dose 0. a is the SAE's
        own activation, for a top-k SAE ReLU(h); a gate's mean within rounding of its threshold may
        be told otherwise than the kernel decided, as long as the token did not change.
        """
        sums, maxima = self.table.sums.tolist(), self.table.maxima.tolist()
        return {
            digest: _numbers(resident, sums[resident.slot], maxima[resident.slot])
            for digest, resident in self._residents.items()
        }

    def _named(self, policy: Policy, also: Sequence[int]) -> tuple[int, ...]:
        check_features(self.sae, tuple(also))
        gated = () if policy.gate is None else policy.gate.features
        edited = (feature for step in policy.operations for feature in step.features)
        return tuple(dict.fromkeys([*gated, *edited, *also]))

    def _enter(self, policy: Policy, named: tuple[int, ...]) -> _Resident:
        gated = () if policy.gate is None else policy.gate.features
        watched = named[: self.features]
        rows = fetch_rows(self.sae, [(f, self.sae.config.has_threshold) for f in watched])
        if not self._free:
            self._evict()
        slot, table, count = self._free.pop(), self.table, len(watched)
        resident = _Resident(slot, policy, watched, named[count:])
        with torch.inference_mode(False), torch.no_grad():
            for name in ("enc", "bias", "floor", "gate"):
                getattr(table, name)[slot].zero_()
            table.enc[slot, :count].copy_(rows.enc)
            table.bias[slot, :count].copy_(rows.bias)
            table.floor[slot, :count].copy_(rows.theta.clamp(min=0))
            table.gate[slot, : len(gated)] = 1 / max(1, len(gated))
            table.count[slot] = count
            table.above[slot] = -torch.inf if policy.gate is None else policy.gate.above
        self._clear(slot)
        return resident

    def _evict(self) -> None:
        idle = [digest for digest, each in self._residents.items() if not each.users]
        if not idle:
            raise FastsaeError(
                f"max_policies: {self.policies} policies are in use and watched, one more does not "
                "fit; attach with a larger max_policies, or set fewer policies at once"
            )
        self._free.append(self._residents.pop(idle[0]).slot)

    def _clear(self, slot: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.table.sums[slot].zero_()
            self.table.maxima[slot].zero_()


def _numbers(resident: _Resident, sums: list[float], maxima: list[float]) -> dict[str, Any]:
    policy, tokens, opened = resident.policy, int(sums[0]), int(sums[2])
    gate: dict[str, int] | None = None
    if policy.gate is not None:
        whole = set(policy.gate.features) <= set(resident.watched)
        gate = {"opened": opened, "closed": tokens - opened} if whole else {}
    return {
        "policy": policy.label,
        "tokens": tokens,
        "not_finite": int(sums[1]),
        "gate": gate,
        "features": {
            feature: {"sum": sums[4 + j], "max": maxima[1 + j]}
            for j, feature in enumerate(resident.watched)
        },
        "left_out": list(resident.left),
        "dose": {"sum": sums[3], "max": maxima[0]},
    }
