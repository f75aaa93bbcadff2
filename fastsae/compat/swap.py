"""Exchanging an object's class for an accelerated subclass of it, and back.

The class is exchanged and not the methods: methods put on an instance would keep working on the
original after `copy.deepcopy`. A subclass made here has its base's name, passes `isinstance`, and
pickles as its base plus one line that exchanges the class again.
"""

import copyreg
import functools

import torch
from torch import nn

from fastsae.errors import FastsaeError

_OWN = ("__dict__", "__weakref__", "__module__", "__qualname__", "__doc__")


class Accelerated:
    """What every mixin starts from. Its methods are copied into a subclass of the peer's class.

    They are copied because Python exchanges classes only where the chain of first bases stays the
    same; `self._base.method(self, ...)` is therefore the peer's method, and `super()` is not.
    """

    _base: type
    _mixin: type

    def __reduce_ex__(self, protocol):
        function, args, *rest = self._base.__reduce_ex__(self, protocol)
        if function is not copyreg.__newobj__ or len(args) != 1:
            raise FastsaeError(
                f"obj: this {self._base.__name__} cannot be pickled while it is accelerated; call "
                "fastsae.compat.restore first, and accelerate after loading"
            )
        return (_make, (self._base, self._mixin), *rest)


def accelerated(obj) -> bool:
    return "_mixin" in vars(type(obj))


def _make(base: type, mixin: type):
    cls = subclass(base, mixin)
    return cls.__new__(cls)


@functools.cache
def subclass(base: type, mixin: type) -> type:
    body = {}
    for part in reversed(mixin.__mro__[:-1]):
        body |= {name: value for name, value in vars(part).items() if name not in _OWN}
    body |= {"_base": base, "_mixin": mixin, "__doc__": base.__doc__}
    body |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base)(base.__name__, (base,), body)


def exchange(obj: nn.Module, mixin: type) -> None:
    obj.__class__ = subclass(type(obj), mixin)


def give_back(obj: nn.Module) -> None:
    obj.__class__ = obj._base


@torch.no_grad()
def rows_first(parameter: torch.Tensor) -> None:
    """Stores a [D, F] parameter so that its transpose is contiguous; shape and values stay.

    Every edit of the parameter is then an edit of the [F, D] matrix that the kernels read: there
    is no copy that could go stale.
    """
    if not parameter.T.is_contiguous():
        parameter.data = parameter.data.T.contiguous().T


@torch.no_grad()
def as_declared(parameter: torch.Tensor) -> None:
    """Stores a parameter row-contiguously, as its library makes it."""
    if not parameter.is_contiguous():
        parameter.data = parameter.data.contiguous()
