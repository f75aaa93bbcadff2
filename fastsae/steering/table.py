"""Policies of one SAE packed into the fixed buffers that the steer op reads."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops.steer import SteerTable
from fastsae.sae import SAE
from fastsae.steering.lower import Item, Lowered, RowKey, fetch_rows, lower
from fastsae.steering.policy import Policy
from fastsae.steering.transcoder import plain


class Capacity(NamedTuple):
    """How much a PolicyTable can hold at once. The buffers take max_features · d_in · 8 bytes."""

    max_policies: int = 64  # different policies in use
    max_features: int = 512  # different features they name
    max_operations: int = 8  # operations in one policy
    max_items: int = 4096  # features over all operations and gates

    def checked(self) -> "Capacity":
        for name, value in self._asdict().items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FastsaeError(f"{name}: expected a positive integer, got {value!r}")
        return self

    @classmethod
    def of(cls, sae: SAE, policies: Iterable[Policy]) -> "Capacity":
        """Just enough for these policies."""
        different = {policy.digest: policy for policy in policies}.values()
        lowered = [lower(sae, policy) for policy in different]
        rows = set().union(*(each.rows for each in lowered))
        return cls(
            max(1, len(lowered)),
            max(1, len(rows)),
            max([1, *(len(each.steps) for each in lowered)]),
            max(1, sum(each.items for each in lowered)),
        )


class _Resident:
    def __init__(self, slot: int, lowered: Lowered):
        self.slot, self.lowered, self.users = slot, lowered, 0


class PolicyTable:
    """Slots of a SteerTable, keyed by policy digest and counted by use; slot 0 does nothing.

    All buffers are allocated here, once, and only their contents change, so a compiled or captured
    model sees every update. `acquire` gives a policy's slot and `release` gives it back; a released
    policy stays packed until its room is needed, so that setting it again copies nothing.
    Rows of features are shared by all policies. transcoders: serve one as well, on rows of d_in +
    d_out (steering/transcoder.py). Not thread-safe.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        capacity: Capacity | None = None,
        device: torch.device | str = "cpu",
        transcoders: bool = False,
    ):
        config = plain(sae.config) if transcoders else sae.config
        config.require_plain("steering", normalization=("center",))
        self.sae = sae
        self.capacity = capacity = (capacity or Capacity()).checked()
        self._residents: dict[str, _Resident] = {}  # least recently used first
        self._rows: dict[RowKey, int] = {}
        self._free_slots = list(range(capacity.max_policies, 0, -1))
        self._free_rows = list(range(capacity.max_features - 1, -1, -1))
        self.buffers = self._allocate(torch.device(device))

    def _allocate(self, device: torch.device) -> SteerTable:
        rows, width, operations, items = (
            self.capacity.max_features,
            self.sae.config.d_in + (self.sae.config.d_out or 0),
            self.capacity.max_operations,
            self.capacity.max_items,
        )
        slots = self.capacity.max_policies + 1
        with torch.inference_mode(False):  # an inference tensor could not be updated later
            floats = {
                "enc": (rows, width),
                "bias": (rows,),
                "theta": (rows,),
                "dec": (rows, width),
                "op_scalar": (slots, operations),
                "item_value": (items,),
                "gate_above": (slots,),
            }
            integers = {
                "op_kind": (slots, operations),
                "op_begin": (slots, operations),
                "op_end": (slots, operations),
                "item_row": (items,),
                "gate_begin": (slots,),
                "gate_end": (slots,),
                "norm_preserve": (slots,),
            }
            zeros = {name: torch.zeros(shape) for name, shape in floats.items()} | {
                name: torch.zeros(shape, dtype=torch.int32) for name, shape in integers.items()
            }
            return SteerTable(**{name: keep_address(t.to(device)) for name, t in zeros.items()})

    @property
    def device(self) -> torch.device:
        return self.buffers.enc.device

    def acquire(self, policy: Policy) -> int:
        """The policy's slot, packed on first use; every `acquire` needs a `release`.

        FastsaeError when the SAE cannot serve the policy or no room is left; nothing changed then.
        """
        resident = self._residents.pop(policy.digest, None)
        if resident is None:
            resident = self._pack(policy)
        self._residents[policy.digest] = resident  # now the most recently used
        resident.users += 1
        return resident.slot

    def release(self, policy: Policy) -> None:
        """One user of the policy less."""
        resident = self._residents[policy.digest]
        assert resident.users > 0, "release without acquire"
        resident.users -= 1

    def _pack(self, policy: Policy) -> _Resident:
        lowered = lower(self.sae, policy)
        if len(lowered.steps) > self.capacity.max_operations:
            self._refuse(policy, "max_operations", len(lowered.steps), 0)
        self._make_room(policy, lowered)
        missing = sorted(lowered.rows - self._rows.keys())
        fetched = fetch_rows(self.sae, missing)
        places = [self._free_rows.pop() for _ in missing]
        self._rows |= dict(zip(missing, places, strict=True))
        resident = _Resident(self._free_slots.pop(), lowered)
        with torch.inference_mode(False), torch.no_grad():
            index = torch.tensor(places, dtype=torch.long, device=self.device)
            for name, values in fetched._asdict().items():
                getattr(self.buffers, name).index_copy_(0, index, values.to(self.device))
            self._write([*self._residents.values(), resident])
        return resident

    def _make_room(self, policy: Policy, lowered: Lowered) -> None:
        """Unpack idle policies, the least recently used first, until this one fits."""
        while True:
            items = sum(each.lowered.items for each in self._residents.values())
            missing = len(lowered.rows - self._rows.keys())
            if not self._free_slots:
                short = ("max_policies", 1, len(self._residents))
            elif missing > len(self._free_rows):
                short = ("max_features", missing, len(self._rows))
            elif items + lowered.items > self.capacity.max_items:
                short = ("max_items", lowered.items, items)
            else:
                return
            idle = [digest for digest, each in self._residents.items() if not each.users]
            if not idle:
                self._refuse(policy, *short)
            self._evict(idle[0])

    def _evict(self, digest: str) -> None:
        gone = self._residents.pop(digest)
        self._free_slots.append(gone.slot)
        used = Counter(row for each in self._residents.values() for row in each.lowered.rows)
        for row in gone.lowered.rows:
            if not used[row]:
                self._free_rows.append(self._rows.pop(row))

    def _refuse(self, policy: Policy, name: str, more: int, used: int) -> None:
        room = getattr(self.capacity, name)
        raise FastsaeError(
            f"{name}: policy {policy.label} needs {more}, and {used} of {room} are in use; "
            f"attach with a larger {name}, or set fewer policies at once"
        )

    def _write(self, residents: list[_Resident]) -> None:
        """Lay the items of all residents out again; begin and end move with them."""
        table = {
            name: torch.zeros(t.shape, dtype=t.dtype)
            for name, t in self.buffers._asdict().items()
            if name not in ("enc", "bias", "theta", "dec")
        }
        items: list[Item] = []

        def put(more: tuple[Item, ...]) -> tuple[int, int]:
            items.extend(more)
            return len(items) - len(more), len(items)

        for resident in residents:
            slot, lowered = resident.slot, resident.lowered
            for p, step in enumerate(lowered.steps):
                begin, end = put(step.items)
                table["op_kind"][slot, p] = step.kind
                table["op_begin"][slot, p], table["op_end"][slot, p] = begin, end
                table["op_scalar"][slot, p] = step.scalar
            table["gate_begin"][slot], table["gate_end"][slot] = put(lowered.gate)
            table["gate_above"][slot] = lowered.gate_above
            table["norm_preserve"][slot] = int(lowered.norm_preserve)
        rows = [self._rows[item.row] for item in items]
        table["item_row"][: len(items)] = torch.tensor(rows, dtype=torch.int32)
        table["item_value"][: len(items)] = torch.tensor([item.value for item in items])
        for name, values in table.items():
            getattr(self.buffers, name).copy_(values)


def keep_address(tensor: Tensor) -> Tensor:
    """Tell torch.compile that this tensor never moves: a CUDA graph then needs no copy of it."""
    if tensor.is_cuda:
        import torch._dynamo

        torch._dynamo.mark_static_address(tensor)
    return tensor
