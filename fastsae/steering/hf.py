"""Steer a Hugging Face model: hooks on decoder layers apply a policy to each row of the batch.

Works on any module whose decoder layers return the residual stream, or a tuple that begins with
it; transformers itself is never imported. The hooks are there from `attach` to `detach`; what they
do is decided by the contents of buffers, so `set` reaches a model compiled after `attach`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import nn

from fastsae import models
from fastsae.errors import FastsaeError
from fastsae.places import Place, resolve_place, site
from fastsae.sae import SAE
from fastsae.steering.dose import Dose
from fastsae.steering.hooks import Host
from fastsae.steering.membership import is_staged, stages
from fastsae.steering.policy import Policy
from fastsae.steering.site import Rows, Site
from fastsae.steering.table import Capacity
from fastsae.steering.trace import Trace
from fastsae.steering.transcoder import is_transcoder, places_of

PolicyRows = Policy | Sequence[Policy | None] | None


class SteeringHandle:
    """The hooks `attach` installed; a context manager that detaches.

    One thread at a time may set policies and run the model. Gradients do not flow through a steered
    residual.
    """

    def __init__(self, model: nn.Module, sites: dict[Place, Site]):
        self.model, self.sites = model, sites
        self._host = Host.of(model)
        for place, each in sites.items():
            self._host.add(place, each, model)
        self._host.wrap(model)

    def set(
        self,
        policies: "PolicyRows | Mapping[int | str, PolicyRows]",
        *,
        strengths: float | Sequence[float] | None = None,
        prompt_lengths: int | Sequence[int] | None = None,
        requests: Sequence[str] | None = None,
    ) -> None:
        """Steer the following forwards: one policy for all rows, or a policy or None per row.

        None alone switches everything off: the hooks return at once. Rows with None come out
        bit-identical. With several layers attached, pass {layer: policies}; layers left out are
        off. strengths: a number, or one per row (default 1; 0 means no policy). A list of one
        policy also serves all rows; any other length must match the batch, else the forward
        raises. `generate` may expand rows (beams, num_return_sequences): they keep their policy.

        prompt_lengths, in real tokens, is for phases in a decoding loop of your own; `generate`
        needs none. Without it, a forward outside `generate` is all prompt when it starts from an
        empty cache or from none, and tokens that follow a filled cache are generated.

        With `generate_batch` a row is a prompt, in order. A continuous batching manager of your own
        (made after attach) takes requests=, the request id of each row; a request it does not name
        is refused. Rows that differ need ContinuousBatchingConfig(allow_block_sharing=False).
        There a request whose residual steering would make unusable (not finite, or too large for
        the norms that follow) fails alone: its output has an error and no tokens.

        When it raises, what was set before stays. `counts` starts again at 0.
        """
        self._check_attached()
        per_place = self._per_place(policies)
        rows = {p: _rows(per_place.get(p), strengths, prompt_lengths) for p in self.sites}
        named = _requests(requests, rows.values())
        before = {place: each.rows for place, each in self.sites.items()}
        try:
            for place, each in self.sites.items():
                each.set(rows[place])
        except Exception:
            for place, each in self.sites.items():
                each.set(before[place])
            raise
        finally:
            for place, each in self.sites.items():
                self._host.refresh(place, each)
        self._host.requests = named

    def forget(self, request_id: str) -> None:
        """Drop what is known of a request that has ended, in a manager that lives on."""
        self._check_attached()
        if self._host.tracker.requests is not None:
            self._host.tracker.requests.forget(request_id)

    def _check_attached(self) -> None:
        if self._host is None:
            raise FastsaeError("handle: it is detached; call fastsae.attach again")

    def _per_place(self, policies) -> "dict[Place, PolicyRows]":
        if isinstance(policies, Mapping):
            return {self._attached(layer): rows for layer, rows in policies.items()}
        if policies is not None and len(self.sites) > 1:
            raise FastsaeError(
                f"policies: {len(self.sites)} layers are attached, each with its own features; "
                "pass {layer: policies}"
            )
        return dict.fromkeys(self.sites, policies)

    def _attached(self, layer: int | str) -> Place:
        place = resolve_place(layer)
        if place not in self.sites and isinstance(layer, int):
            place = next((each for each in self.sites if each.layer == layer), place)
        if place not in self.sites:
            at = ", ".join(map(str, self.sites))
            raise FastsaeError(f"policies: nothing is attached at {layer!r}, only at {at}")
        return place

    def counts(self) -> dict[str, list[int]]:
        """{place: tokens steered since `set`, per row that was set}, a token once per forward.

        A row's beams and copies count together. Tokens in their row's phase that are neither
        padding nor a first token count, whether or not a gate let the operations through.
        `generate` of n tokens steers n − 1 of them and the prompt: the last token is never fed
        back. Compiled graphs count too. Waits for the device.
        """
        return {
            str(place): [] if each.counts is None else each.counts[:, 0].tolist()
            for place, each in self.sites.items()
        }

    def watched(self) -> dict[str, dict]:
        """{place: {policy digest: gates, features and doses of its steered tokens, added up}}.

        For `attach(..., watch=True)`; the numbers are those of `fastsae.steering.watch.Watch.read`.
        They stay when the rows change, as long as the policy's slot is not needed. Waits for the
        device.
        """
        self._check_attached()
        if any(each.watch is None for each in self.sites.values()):
            raise FastsaeError("watch: nothing was watched; attach with watch=True")
        return {str(place): each.watch.read() for place, each in self.sites.items()}

    def observe(self, told: "Callable[[float], None] | None") -> None:
        """Calls `told` after every forward in which a row has a policy, with the seconds that all
        hooked places of the model took together; None ends it.

        On the host's clock: on a GPU that is the time to launch, not to compute. A compiled model
        tells nothing. `told` runs in the thread of the forward.
        """
        self._check_attached()
        self._host.tracker.observe = told

    @contextlib.contextmanager
    def trace(self, features: "int | Sequence[int]", *, layer=None) -> Iterator[Trace]:
        """`with handle.trace([12, 99]) as trace: model.generate(...)`, then `trace.rows()`.

        Records the features' activations before and after the policies for every token that runs,
        steered or not. layer: which attached place, if there are several.
        """
        self._check_attached()
        if layer is None and len(self.sites) > 1:
            raise FastsaeError(
                f"layer: {len(self.sites)} places are attached; pass layer=, one of "
                f"{', '.join(map(str, self.sites))}"
            )
        place = next(iter(self.sites)) if layer is None else self._attached(layer)
        traced, point = self.sites[place], self._host.points[place]
        if traced.transcodes:
            raise FastsaeError(
                f"trace: {place} is what a transcoder writes; its features read {traced.reads}, "
                "which its policies do not change: record that input and sae.encode it"
            )
        if traced.trace is not None:
            raise FastsaeError(f"trace: {place} is being traced already; name all features at once")
        traced.trace = Trace(traced.sae, features)
        point.refresh()
        try:
            yield traced.trace
        finally:
            traced.trace = None
            point.refresh()

    @property
    def active(self) -> bool:
        """Whether any row of any layer has a policy."""
        return any(each.active for each in self.sites.values())

    def detach(self) -> None:
        """Remove the hooks; the model is as before. A second call does nothing."""
        if self._host is None:
            return
        for place, each in self.sites.items():
            each.set(Rows())
            self._host.remove(place, each)
        self._host.unwrap(self.model)
        self._host = None

    def __enter__(self) -> "SteeringHandle":
        return self

    def __exit__(self, *error) -> None:
        self.detach()


def attach(
    model: nn.Module,
    saes: "SAE | Mapping[int | str, SAE]",
    *,
    max_policies: int = Capacity().max_policies,
    max_features: int = Capacity().max_features,
    max_operations: int = Capacity().max_operations,
    max_items: int = Capacity().max_items,
    first_token: bool = False,
    dose: Dose | None = None,
    watch: bool = False,
) -> SteeringHandle:
    """Hook a model once, idle, for production: `handle.set` then decides what each row gets.

    saes: {layer: sae}, a layer being a number (its output, or the place in it where the SAE says it
    was trained) or a hook point such as "blocks.9.hook_resid_pre", "resid_mid.9", "attn_out.9",
    "mlp_in.9", "mlp_out.9" or "layers.9.mlp.output" (fastsae.places); or one SAE that knows its
    own. dose: a limit on the relative change of a token (fastsae.steering.Dose). watch: add up, per
    policy, what `SteeringHandle.watched` gives. The max_ arguments fix the buffers of each layer:
    max_features · d_in · 8 bytes most of it. Padding, known from the 2-D attention mask or from
    position ids, is never steered; nor is each row's first token, which carries huge norms in most
    models, unless `first_token`.

    A transcoder says itself where it reads and writes (hook_name, hook_name_out): its policies add
    to what it writes the change of features read before all operations (steering/transcoder.py).

    Attach *before* torch.compile: a compiled model is refused, because graphs ignore later hooks.
    Several handles may share a model; at one layer they apply in the order of attachment.
    Raises FastsaeError when a layer is missing or an SAE does not fit the model's width.
    """
    _refuse_compiled(model)
    capacity = Capacity(max_policies, max_features, max_operations, max_items).checked()
    if dose is not None and not isinstance(dose, Dose):
        raise FastsaeError(f"dose: expected fastsae.steering.Dose(limit, action), got {dose!r}")
    sites: dict[Place, Site] = {}
    for layer, sae in (saes if isinstance(saes, Mapping) else {None: saes}).items():
        if not isinstance(sae, SAE):
            raise FastsaeError(
                f"saes: expected a fastsae.SAE for {layer!r}, got {type(sae).__name__}"
            )
        pair = places_of(layer, sae.config) if is_transcoder(sae.config) else None
        place, reads = pair or (_place(layer, sae), None)
        if place in sites:
            raise FastsaeError(f"saes: {layer!r} names the same place as another key")
        module, _ = site(model, *place)
        _check_width(model, sae)
        sites[place] = Site(sae, capacity, _device(module), first_token, dose, watch)
        if reads is not None:
            site(model, *reads)  # raises where the model has no such place
            sites[place].reads = reads
    if not sites:
        raise FastsaeError("saes: expected at least one {layer: sae}, got none")
    return SteeringHandle(model, sites)


@contextlib.contextmanager
def steer(
    model: nn.Module,
    sae: SAE,
    policy: "Policy | Sequence[Policy | None]",
    *,
    layer: int | str | None = None,
    strength: float | Sequence[float] = 1.0,
    first_token: bool = False,
    dose: Dose | None = None,
) -> Iterator[SteeringHandle]:
    """`with steer(model, sae, policy): model.generate(...)`: steer inside the block, undo after it.

    The layer comes from the SAE's hook point unless `layer` names one. policy and strength may be
    one for all rows, or one per row (see `SteeringHandle.set`). Nest blocks for several layers; two
    at the same layer apply the outer one first. Also undone when the block raises.
    """
    listed = [policy] if isinstance(policy, Policy) else policy
    policies = [each for each in listed or () if isinstance(each, Policy)]
    parts = [
        part
        for each in policies
        for part in (stages(sae, each) if is_staged(sae, each) else [each])
        if isinstance(part, Policy)
    ]
    capacity = Capacity.of(sae, parts)._asdict()
    handle = attach(
        model,
        sae if layer is None else {layer: sae},
        first_token=first_token,
        dose=dose,
        **capacity,
    )
    with handle:
        handle.set(policy, strengths=strength)
        yield handle


# --- arguments ----------------------------------------------------------------------------------


def _rows(policies: PolicyRows, strengths, lengths) -> Rows:
    if policies is None:
        return Rows()
    listed = [policies] if isinstance(policies, Policy) else policies
    if isinstance(listed, str) or not isinstance(listed, Sequence) or not listed:
        raise FastsaeError(f"policies: expected a Policy, a list of them, or None; got {listed!r}")
    for i, policy in enumerate(listed):
        if policy is not None and not isinstance(policy, Policy):
            raise FastsaeError(f"policies[{i}]: expected a Policy or None, got {policy!r}")
    strengths = 1.0 if strengths is None else strengths
    per_row = strengths if isinstance(strengths, Sequence) else [strengths] * len(listed)
    if len(per_row) != len(listed):
        raise FastsaeError(
            f"strengths: got {len(per_row)} for {len(listed)} policies; pass one number or one each"
        )
    for i, strength in enumerate(per_row):
        number = isinstance(strength, int | float) and not isinstance(strength, bool)
        if not number or not math.isfinite(strength):
            raise FastsaeError(f"strengths[{i}]: expected a finite number, got {strength!r}")
    if lengths is not None:
        lengths = lengths if isinstance(lengths, Sequence) else [lengths]
        for i, length in enumerate(lengths):
            if isinstance(length, bool) or not isinstance(length, int) or length < 0:
                raise FastsaeError(f"prompt_lengths[{i}]: expected an integer ≥ 0, got {length!r}")
    return Rows(listed, per_row, lengths)


def _requests(requests, rows) -> list[str] | None:
    if requests is None:
        return None
    named = [] if isinstance(requests, str) else list(requests)
    if not named or len(set(named)) < len(named) or not all(isinstance(n, str) for n in named):
        raise FastsaeError(f"requests: expected different request ids, got {requests!r}")
    for each in rows:
        if len(each.policies) not in (0, len(named)):
            raise FastsaeError(
                f"requests: got {len(named)} ids for {len(each.policies)} policies; name each row"
            )
    return named


def _place(layer: "int | str | Place | None", sae: SAE) -> Place:
    own = sae.config.hook_name
    if layer is None:
        if own is None:
            raise FastsaeError(
                "layer: this SAE does not say where it was trained (config.hook_name is None); "
                "pass layer=, for instance 12"
            )
        return resolve_place(own)
    place = resolve_place(layer)
    if own is not None and isinstance(layer, int):
        try:
            trained = resolve_place(own)
        except FastsaeError:
            return place  # trained where no module carries its input: the caller's choice
        return trained if trained.layer == place.layer else place
    return place


def _check_width(model: nn.Module, sae: SAE) -> None:
    width = models.hidden_size(model) if hasattr(model, "config") else sae.config.d_in
    for does, own in (("reads", sae.config.d_in), ("writes", sae.config.width_out)):
        if own != width:
            raise FastsaeError(
                f"sae: {does} {own} dimensions, {type(model).__name__} has {width}; take an SAE "
                "trained on this model"
            )


def _device(layer: nn.Module) -> torch.device:
    """Where the layer's residual will be; offloaded weights say so only at the first forward."""
    devices = [p.device for p in layer.parameters() if p.device.type != "meta"]
    return devices[0] if devices else torch.device("cpu")


def _refuse_compiled(model: nn.Module) -> None:
    """Raise if torch.compile has already made graphs of the model, or of a part with its layers."""
    layers = models.decoder_layers(model)
    around = [m for m in model.modules() if any(child is layers for child in m.modules())]
    for module in [*around, *layers]:
        compiled = (
            hasattr(module, "_orig_mod")
            or getattr(module, "_compiled_call_impl", None) is not None
            or (module in around and hasattr(module.forward, "_torchdynamo_orig_callable"))
        )
        if compiled:
            raise FastsaeError(
                f"model: {type(getattr(module, '_orig_mod', module)).__name__} is compiled "
                "already, and a compiled graph silently ignores hooks that are added later; attach "
                "to the original model first, compile after it, and switch with handle.set"
            )
