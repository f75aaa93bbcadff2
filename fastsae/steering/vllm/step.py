"""What the rows of the next forward get: one block of memory, written on the host, copied once."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNED = 64  # entries: compiled graphs expect their inputs to begin at multiples of 16 bytes


class Applied:
    """A policy in a site's tables: which numbers its rows get. stages: see `steer_residual_`."""

    def __init__(self, slot: int, stages: list[int] | None, watch: int = 0):
        self.slot, self.stages, self.watch = slot, stages, watch


class StepRows:
    """slots, strengths, watched (0 where `watch` is false) and `stages` fields of max_tokens rows.

    `tensors` are their views for the op, which never move; `active` are its two flags. On a CPU the
    host writes into them directly.
    """

    def __init__(self, max_tokens: int, stages: int, watch: bool, device):
        width = -(-max_tokens // ALIGNED) * ALIGNED
        first, fields = 2 + int(watch), 2 + int(watch) + stages
        with torch.inference_mode(False):  # an inference tensor could not be updated later
            self._host = torch.zeros(fields * width + ALIGNED, dtype=torch.int32)
            self._block = self._host.to(device)  # on a CPU the same memory
        self._fields = self._host[: fields * width].view(fields, width).numpy()
        self._strengths = self._host[width : 2 * width].view(torch.float32).numpy()
        self._active = self._host[fields * width :].numpy()
        self._first, self._watch = first, watch
        self._spans: list = []
        self._end = 0
        rows = self._block[: fields * width].view(fields, width)[:, :max_tokens]
        self.tensors: dict[str, Tensor] = {"active": self._block[fields * width :][:2]}
        self.tensors["slots"] = rows[0]
        self.tensors["strengths"] = rows[1].view(torch.float32)
        if watch:
            self.tensors["watched"] = rows[2]
        if stages:
            self.tensors["stages"] = rows[first:]

    @property
    def idle(self) -> bool:
        """Whether no row has a policy."""
        return not self._spans

    def fill(self, spans: Sequence[tuple[int, int, Applied, float]]) -> None:
        """Rows begin:end get a policy and a strength, all others slot 0; nothing if all have."""
        if spans == self._spans:
            return
        fields = self._fields
        fields[:, : self._end] = 0
        self._end = steered = staged = 0
        for begin, end, applied, strength in spans:
            fields[0, begin:end] = applied.slot
            self._strengths[begin:end] = strength
            if self._watch:
                fields[2, begin:end] = applied.watch
            if applied.stages is None:
                steered = 1
            else:
                staged = 1
                for row, slot in enumerate(applied.stages, self._first):
                    fields[row, begin:end] = slot
            self._end = max(self._end, end)
        self._active[:2] = steered, staged
        self._spans = list(spans)
        if self._block is not self._host:
            with torch.inference_mode(False), torch.no_grad():
                self._block.copy_(self._host)
