"""A policy in the numbers of one SAE: feature rows, coefficients and thresholds, units resolved."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.ops.steer import KINDS
from fastsae.sae import SAE
from fastsae.steering.policy import Ablate, Add, Amplify, Calibrate, Enforce, Operation, Policy

RowKey = tuple[int, bool]  # a feature, and whether its activation obeys the SAE's threshold


class Item(NamedTuple):
    row: RowKey
    value: float


class Step(NamedTuple):
    """One operation as the kernel sees it."""

    kind: int
    items: tuple[Item, ...]
    scalar: float = 0.0


class Lowered(NamedTuple):
    """A policy as the kernel sees it."""

    steps: tuple[Step, ...]
    gate: tuple[Item, ...]
    gate_above: float
    norm_preserve: bool

    @property
    def items(self) -> int:
        return sum(len(step.items) for step in self.steps) + len(self.gate)

    @property
    def rows(self) -> set[RowKey]:
        listed = [*self.gate, *(item for step in self.steps for item in step.items)]
        return {item.row for item in listed}


class Rows(NamedTuple):
    """Encoder and decoder rows of some features, on the CPU."""

    enc: Tensor  # [R, D] float32; of a transcoder [w, 0], D = d_in + d_out
    bias: Tensor  # [R] float32, b_enc − s·⟨w, b_dec⟩ computed in float64
    theta: Tensor  # [R] float32
    dec: Tensor  # [R, D] float32; of a transcoder [0, d]


def needs_membership(sae: SAE, operation: Operation) -> bool:
    """Whether a feature's activation depends on all the others: it must be among the k largest."""
    own = isinstance(operation, Amplify) and operation.active == "sae"
    return own and sae.config.activation in ("topk", "groupmax")


def lower(sae: SAE, policy: Policy, *, membership: bool = False) -> Lowered:
    """The policy for this SAE; a feature it does not have or a unit it cannot serve is an error.

    The steer op knows no top-k membership: an operation that needs it is an error too, unless the
    caller says with `membership` that it decides that itself (steering/membership.py).
    """
    steps = []
    for i, operation in enumerate(policy.operations):
        try:
            if needs_membership(sae, operation) and not membership:
                raise FastsaeError(
                    'active: "sae" on a top-k SAE asks which features are among the k largest; '
                    'only the Hugging Face adapter computes that, use active="relu" here'
                )
            steps.append(_step(sae, operation))
        except FastsaeError as error:
            raise FastsaeError(f"policy {policy.label}: operations[{i}].{error}") from error
    gate, above = (), 0.0
    if policy.gate is not None:
        try:
            check_features(sae, policy.gate.features)
        except FastsaeError as error:
            raise FastsaeError(f"policy {policy.label}: gate.{error}") from error
        gate = tuple(Item((feature, False), 0.0) for feature in policy.gate.features)
        above = policy.gate.above
    return Lowered(tuple(steps), gate, above, policy.norm == "preserve")


def _step(sae: SAE, operation: Operation) -> Step:
    features = operation.features
    check_features(sae, features)
    match operation:
        case Amplify(alpha=values, active=active):
            own = active == "sae" and sae.config.has_threshold
            return _items("amplify", features, values, own)
        case Ablate():
            return _items("amplify", features, (-1.0,) * len(features), False)
        case Calibrate(beta=values, mode=mode, unit=unit):
            kind = "calibrate" if mode == "set" else "floor"
            return _items(kind, features, _scaled(sae, features, values, unit), False)
        case Add(strength=values, unit=unit):
            return _items("add", features, _scaled(sae, features, values, unit), False)
        case Enforce(magnitude=magnitude):
            step = _items("enforce", features, (0.0,) * len(features), False)
            return step._replace(scalar=magnitude)
    raise AssertionError(f"no kernel for {operation!r}")


def _items(kind: str, features, values, own: bool) -> Step:
    pairs = zip(features, values, strict=True)
    return Step(KINDS[kind], tuple(Item((feature, own), value) for feature, value in pairs))


def check_features(sae: SAE, features: tuple[int, ...]) -> None:
    for feature in features:
        if feature >= sae.config.d_sae:
            raise FastsaeError(
                f"features: {feature} is out of range, this SAE has features 0 to "
                f"{sae.config.d_sae - 1}"
            )


def _scaled(sae: SAE, features, values, unit: str) -> tuple[float, ...]:
    if unit == "raw":
        return values
    if sae.stats is None:
        raise FastsaeError(
            f'unit: "{unit}" needs feature statistics and this SAE has none; set sae.stats = '
            'fastsae.training.measure.feature_stats(sae, activations), or use unit="raw"'
        )
    scales = getattr(sae.stats, unit)[torch.tensor(features)].tolist()
    for feature, scale in zip(features, scales, strict=True):
        if not 0 < scale < float("inf"):
            raise FastsaeError(
                f"unit: feature {feature} has a {unit} activation of {scale} in sae.stats: it "
                'never fired on the measured text; use unit="raw" for it'
            )
    return tuple(value * scale for value, scale in zip(values, scales, strict=True))


def fetch_rows(sae: SAE, keys: list[RowKey]) -> Rows:
    """The weights of some features; NaN or infinity in one is an error that names the feature."""
    index = torch.tensor([feature for feature, _ in keys], dtype=torch.long)

    def rows(parameter: Tensor) -> Tensor:
        return parameter.detach()[index.to(parameter.device)].to("cpu")

    enc, dec, bias = rows(sae.W_enc), rows(sae.W_dec).float(), rows(sae.b_enc).double()
    if sae.config.apply_b_dec_to_input:
        bias = bias - enc.double() @ sae.b_dec.detach().to("cpu").double()
    if sae.config.normalization == "center":  # W (x − mean x) = (W − its row means) x
        enc = enc.double() - enc.double().mean(dim=1, keepdim=True)
    theta = torch.zeros(len(keys))
    if sae.config.has_threshold:
        own = torch.tensor([own for _, own in keys], dtype=torch.bool)
        theta = torch.where(own, rows(sae.threshold).float(), theta)
    fetched = Rows(enc.float(), bias.float(), theta, dec)
    broken = (
        ~torch.stack(
            [fetched.enc.isfinite().all(1), fetched.dec.isfinite().all(1), bias.isfinite()]
        ).all(0)
        | theta.isnan()
    )
    if broken.any():
        feature = keys[int(broken.nonzero()[0])][0]
        raise FastsaeError(
            f"features: {feature} has NaN or infinite weights in this SAE; steer without it, or "
            "load an intact checkpoint"
        )
    if sae.config.d_out is not None:
        enc = torch.nn.functional.pad(fetched.enc, (0, sae.config.d_out))
        dec = torch.nn.functional.pad(fetched.dec, (sae.config.d_in, 0))
        return fetched._replace(enc=enc, dec=dec)
    return fetched
