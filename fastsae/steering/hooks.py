"""What fastsae puts on a model: hooks around its decoder layers and a wrapper around `generate`.

One `Host` per model serves all its handles, so the order of several sites at one layer is the order
in which they were attached, whatever else is hooked there.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from fastsae import models
from fastsae.errors import FastsaeError
from fastsae.models import Hook
from fastsae.steering.positions import Tracker
from fastsae.steering.site import Site


class Point:
    """One side of a decoder layer and the sites that edit it, in the order they were attached."""

    def __init__(self, hook: Hook, layer: nn.Module, tracker: Tracker):
        self.hook, self.tracker = hook, tracker
        self.sites: list[Site] = []
        self.active = False
        # First in line: hidden states that other hooks record are then the steered ones.
        if hook.side == "output":
            self.removable = layer.register_forward_hook(self.after, prepend=True)
        else:
            self.removable = layer.register_forward_pre_hook(
                self.before, prepend=True, with_kwargs=True
            )

    def refresh(self) -> None:
        self.active = any(site.active for site in self.sites)

    def idle(self) -> bool:
        # torch.compile guards on what it sees a hook read, not on which hooks there are: reading
        # the number of points makes a compiled model look again when one is added elsewhere.
        return len(self.tracker.points) == 0 or not self.active

    def after(self, layer, args, output):
        if self.idle():
            return None
        return models.with_residual(output, self._steered(models.residual_of(output)))

    def before(self, layer, args, kwargs):
        if self.idle():
            return None
        if args:
            return (self._steered(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._steered(kwargs["hidden_states"])}

    def _steered(self, residual: Tensor) -> Tensor:
        where = self.tracker.where()
        for site in self.sites:
            if site.active:
                residual = site.apply(residual, where)
        return residual


class Host:
    """Everything fastsae has put on one model, shared by all its handles."""

    def __init__(self, layers: nn.ModuleList, trunk: nn.Module):
        self.layers, self.trunk = layers, trunk
        self.tracker = Tracker(trunk)
        self.points: dict[Hook, Point] = {}
        self.wrapped: list[nn.Module] = []
        self.removable = [
            trunk.register_forward_pre_hook(self.tracker.enter, with_kwargs=True),
            trunk.register_forward_hook(self.tracker.leave),
        ]
        # torch.compile does not notice hooks: it would reuse a graph it made of another model of
        # the same class, without ours. It does notice the type of the list it walks through.
        layers.__class__ = _steered_type(type(layers))
        trunk._fastsae_host = self

    @classmethod
    def of(cls, model: nn.Module) -> "Host":
        layers = models.decoder_layers(model)
        trunk = next(m for m in model.modules() if any(c is layers for c in m.children()))
        return trunk.__dict__.get("_fastsae_host") or cls(layers, trunk)

    def add(self, hook: Hook, site: Site) -> Point:
        if hook not in self.points:
            point = Point(hook, self.layers[hook.layer], self.tracker)
            self.points[hook] = point
            self.tracker.points.append(point)
        self.points[hook].sites.append(site)
        return self.points[hook]

    def remove(self, hook: Hook, site: Site) -> None:
        point = self.points[hook]
        point.sites.remove(site)
        point.refresh()
        if not point.sites:
            point.removable.remove()
            self.tracker.points.remove(self.points.pop(hook))

    def wrap(self, model: nn.Module) -> None:
        """Let `model.generate` tell us where its prompt ends."""
        self.wrapped.append(model)
        if not hasattr(model, "generate") or self.wrapped.count(model) > 1:
            return
        original = model.generate

        @functools.wraps(original)
        def generate(*args, **kwargs):
            with self.generating(args, kwargs):
                return original(*args, **kwargs)

        generate._fastsae_restores = model.__dict__.get("generate")
        model.generate = generate

    def unwrap(self, model: nn.Module) -> None:
        self.wrapped.remove(model)
        ours = model.__dict__.get("generate")
        # If others have wrapped our wrapper since, it stays between them and passes through.
        if model not in self.wrapped and hasattr(ours, "_fastsae_restores"):
            del model.generate
            if ours._fastsae_restores is not None:
                model.generate = ours._fastsae_restores
        if not self.wrapped:
            for handle in self.removable:
                handle.remove()
            self.layers.__class__ = type(self.layers).__mro__[1]
            del self.trunk._fastsae_host

    @contextlib.contextmanager
    def generating(self, args: tuple, kwargs: dict) -> Iterator[None]:
        active = [(point, s, s.calls) for point in self.points.values() for s in point.sites]
        with self.tracker.generating(args, kwargs):
            yield
        if any("_compiled_call" in model.__dict__ for model in self.wrapped):
            return  # generate compiled the forward: inside a graph there is no Python to count
        for point, site, calls in active:
            if site.active and site.calls == calls:
                text = f"layer {point.hook.layer} never ran in generate: nothing was steered there"
                if site.required:
                    raise FastsaeError(f"policy {site.required[0].label} is required, but {text}")
                warnings.warn(text, stacklevel=4)


@functools.cache
def _steered_type(kind: type) -> type:
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})
