"""What fastsae puts on a model: hooks around its decoder layers and a wrapper around `generate`.

One `Host` per model serves all its handles, so the order of several sites at one layer is the order
in which they were attached, whatever else is hooked there.
"""

import contextlib
import functools
import time
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastsae import models, places
from fastsae.errors import FastsaeError
from fastsae.places import Place
from fastsae.steering.batching import Requests
from fastsae.steering.positions import Tracker, Where
from fastsae.steering.site import Site


class Point:
    """One place in a model and the sites that edit it, in the order they were attached."""

    def __init__(self, place: Place, model: nn.Module, tracker: Tracker):
        self.place, self.tracker = place, tracker
        self.in_place = place.point == "resid_mid"  # the residual goes past the norm we hook
        self.sites: list[Site] = []
        self.readers: list[Site] = []  # transcoders that read here and steer elsewhere
        self.active = False
        module, side = places.site(model, *place)
        # First in line: hidden states that other hooks record are then the steered ones.
        if side == "output":
            self.removable = module.register_forward_hook(self.after, prepend=True)
        else:
            self.removable = module.register_forward_pre_hook(
                self.before, prepend=True, with_kwargs=True
            )

    def refresh(self) -> None:
        steers = any(site.active or site.trace is not None for site in self.sites)
        self.active = steers or any(site.active for site in self.readers)

    def demand(self, where: Where) -> None:
        """Raise if a required policy was not applied in the forward that has just ended."""
        for site in self.sites:
            if site.demanded and site not in where.visited:
                raise FastsaeError(
                    f"policy {site.required[0].label} is required, but {self.place} never ran"
                )

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
        given = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(given, Tensor):
            raise FastsaeError(f"{self.place}: its module was called without hidden states")
        steered = self._steered(given)
        if self.in_place:
            with torch.no_grad():
                given.copy_(steered)
            return None
        if args:
            return (steered, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": steered}

    def _steered(self, residual: Tensor) -> Tensor:
        where = self.tracker.where()
        timed = self.tracker.observe is not None and not torch.compiler.is_compiling()
        began = time.perf_counter() if timed else 0.0
        try:
            steered = self._batched(residual, where)
            for site in self.sites:
                before = steered
                if site.active:
                    steered = site.apply(steered, where)
                if site.trace is not None:
                    site.trace.record(before, steered, where)
            for site in self.readers:  # after the sites: what the module really gets
                if site.active:
                    site.read(steered, where)
        except Exception as error:
            self.tracker.failed = error  # a generate_batch only logs what is raised here
            raise
        if timed:
            where.seconds += time.perf_counter() - began
        return steered.view(residual.shape)

    def _batched(self, residual: Tensor, where: Where) -> Tensor:
        """[B, T, D], checked against the ids or embeddings that the model was given."""
        if where.shape is None:
            return residual
        batch, tokens = where.shape
        if residual.dim() == 2 and residual.shape[0] == batch * tokens:  # OPT's MLP
            return residual.view(batch, tokens, residual.shape[1])
        if residual.dim() == 3 and residual.shape[:2] != (batch, tokens):
            raise FastsaeError(
                f"model: given {batch} rows of {tokens} tokens, {self.place} carries "
                f"{list(residual.shape)}; fastsae works on [batch, tokens, hidden size]"
            )
        return residual


class Host:
    """Everything fastsae has put on one model, shared by all its handles."""

    def __init__(self, layers: nn.ModuleList, trunk: nn.Module):
        self.layers, self.trunk = layers, trunk
        self.tracker = Tracker(trunk)
        self.points: dict[Place, Point] = {}
        self.requests: list[str] | None = None  # ids of the requests whose policies are set
        self.wrapped: list[nn.Module] = []
        self.removable = [
            trunk.register_forward_pre_hook(self.tracker.enter, with_kwargs=True),
            trunk.register_forward_hook(self.tracker.leave, always_call=True),
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

    def add(self, place: Place, site: Site, model: nn.Module) -> None:
        self._point(place, model).sites.append(site)
        if site.reads is not None:
            self._point(site.reads, model).readers.append(site)

    def _point(self, place: Place, model: nn.Module) -> Point:
        if place not in self.points:
            point = Point(place, model, self.tracker)
            self.points[place] = point
            self.tracker.points.append(point)
        return self.points[place]

    def refresh(self, place: Place, site: Site) -> None:
        for each in {place, site.reads or place}:
            self.points[each].refresh()

    def remove(self, place: Place, site: Site) -> None:
        self.points[place].sites.remove(site)
        if site.reads is not None:
            self.points[site.reads].readers.remove(site)
        self.refresh(place, site)
        for each in {place, site.reads or place}:
            point = self.points[each]
            if not point.sites and not point.readers:
                point.removable.remove()
                self.tracker.points.remove(self.points.pop(each))

    # --- what continuous batching asks ---------------------------------------------------------

    def _sites(self) -> list[Site]:
        return [s for point in self.points.values() for s in point.sites if s.active]

    def steering(self) -> bool:
        return bool(self._sites())

    def mixed(self) -> bool:
        """Whether two tokens of the same id may be steered differently."""
        return any(s.phased or len(set(s.rows.steered)) > 1 for s in self._sites())

    def rows_set(self) -> int:
        return max(len(s.rows.policies) for s in self._sites())

    def signature(self) -> tuple:
        return tuple(s.rows.steered for s in self._sites())

    # --- the model's own methods ---------------------------------------------------------------

    def wrap(self, model: nn.Module) -> None:
        """Let `generate` tell where its prompt ends, `generate_batch` which request is which."""
        self.wrapped.append(model)
        if self.wrapped.count(model) > 1:
            return
        wrappers = (self._generate, self._generate_batch, self._init_continuous_batching)
        for name, wrapper in zip(_WRAPPED, wrappers, strict=True):
            if hasattr(model, name):
                original = getattr(model, name)
                ours = functools.wraps(original)(functools.partial(wrapper, original))
                ours._fastsae_restores = model.__dict__.get(name)
                setattr(model, name, ours)

    def unwrap(self, model: nn.Module) -> None:
        self.wrapped.remove(model)
        for name in _WRAPPED if model not in self.wrapped else ():
            ours = model.__dict__.get(name)
            # If others have wrapped our wrapper since, it stays between them and passes through.
            if hasattr(ours, "_fastsae_restores"):
                delattr(model, name)
                if ours._fastsae_restores is not None:
                    setattr(model, name, ours._fastsae_restores)
        if not self.wrapped:
            for handle in self.removable:
                handle.remove()
            self.layers.__class__ = type(self.layers).__mro__[1]
            del self.trunk._fastsae_host

    def _generate(self, original, *args, **kwargs):
        with self.generating(args, kwargs):
            return original(*args, **kwargs)

    def _generate_batch(self, original, *args, **kwargs):
        self.tracker.failed = None
        results = original(*args, **kwargs)
        if self.tracker.failed is not None:
            raise self.tracker.failed
        return results

    def _init_continuous_batching(self, original, *args, **kwargs):
        kept = [getattr(m, "_cached_continuous_batching_manager", None) for m in self.wrapped]
        manager = original(*args, **kwargs)
        ours = getattr(manager.add_request, "__self__", None)
        if not isinstance(ours, Requests) or ours.host is not self:
            ours = Requests(manager, self, kept=any(each is manager for each in kept))
        ours.next = 0
        self.tracker.requests = ours
        return manager

    @contextlib.contextmanager
    def generating(self, args: tuple, kwargs: dict) -> Iterator[None]:
        active = [
            (point.place, s, s.calls, int(s.forwards) if s.demanded else 0)
            for point in self.points.values()
            for s in point.sites
            if s.active
        ]
        with self.tracker.generating(args, kwargs):
            yield
        # When generate compiles the forward, there is no Python in it that could count.
        compiled = any("_compiled_call" in model.__dict__ for model in self.wrapped)
        for place, site, calls, forwards in active:
            text = f"{place} never ran in generate: nothing was steered there"
            if site.demanded and int(site.forwards) == forwards:
                raise FastsaeError(f"policy {site.required[0].label} is required, but {text}")
            if site.active and not compiled and site.calls == calls:
                warnings.warn(text, stacklevel=4)


_WRAPPED = ("generate", "generate_batch", "init_continuous_batching")


@functools.cache
def _steered_type(kind: type) -> type:
    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__})
