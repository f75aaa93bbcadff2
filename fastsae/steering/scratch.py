"""Tensors that the hooks of one model use again from token to token."""

import math

import torch
from torch import Tensor


class Scratch:
    """`scratch(name, shape, dtype, device)`: what to pass as `out=`, a buffer or None.

    A buffer is valid until the next forward asks for its name. Only the CPU gets one: there a call
    has ended when it returns, while on an accelerator the same memory could be in use by another
    stream or by a captured graph, and its caching allocator serves small blocks at no cost. Nor
    does a graph that is being compiled, which plans its memory itself. One thread at a time.
    """

    def __init__(self):
        self._flat: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}  # views of them, of the last shape

    def __call__(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor | None:
        if device.type != "cpu" or torch.compiler.is_compiling():
            return None
        kept = self._kept.get(name)
        if kept is None or kept.shape != shape:
            # An inference tensor could not be written outside such a block.
            with torch.inference_mode(False):
                kept = self._kept[name] = self._view(name, shape, dtype)
        return kept

    def _view(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size, flat = math.prod(shape), self._flat.get(name)
        if flat is None or flat.numel() < size:
            # Twice as much as is needed now: masks grow by a column per token.
            flat = self._flat[name] = torch.empty(2 * size, dtype=dtype)
        return flat[:size].view(shape)


def no_scratch(name, shape, dtype, device) -> None:
    """For a caller that may run in several threads at once."""


class Output:
    """`output(x)`: a tensor like x for a site to fill, the last one where nobody holds that now.

    Whoever keeps it (recorded hidden states, autograd, a view) counts as a user of its storage, and
    keeps it for good: the next one is new. To be handed out as a view, because a reference to the
    very same tensor would not count. CPU only, for the reasons of Scratch; one thread at a time.
    """

    def __init__(self):
        self._kept: Tensor | None = None
        self._alone = 0

    def __call__(self, x: Tensor) -> Tensor:
        kept = self._kept
        if kept is not None and kept.shape == x.shape and kept.dtype is x.dtype:
            if _users(kept) == self._alone:
                return kept
        # An inference tensor could not be used in a forward outside such a block.
        with torch.inference_mode(False):
            made = torch.empty_like(x)
        if _count is not None and made.nbytes <= KEPT_BYTES:
            self._kept, self._alone = made, _users(made)
        return made


KEPT_BYTES = 4 << 20  # a decode step of many rows; prompts are new ones every time
# torch's own CUDA graphs count with it. None: every output is a new one.
_count = getattr(torch._C, "_storage_Use_Count", None)


def _users(tensor: Tensor) -> int:
    """How many tensors share this one's storage, and the storage object made to ask."""
    return _count(tensor.untyped_storage()._cdata)
