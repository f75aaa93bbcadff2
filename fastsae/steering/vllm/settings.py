"""What the operator asks for: the entry "fastsae" of vLLM's --additional-config."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastsae.errors import FastsaeError
from fastsae.models import Hook, resolve_hook
from fastsae.steering.control import checked_holdout
from fastsae.steering.dose import Dose
from fastsae.steering.policy import Policy
from fastsae.steering.table import Capacity
from fastsae.steering.watch import FEATURES

KEY = "fastsae"  # in additional_config, and in a request's extra_args


class SiteSettings(NamedTuple):
    """One SAE and the policies over its features that are there from the start."""

    sae: str
    sae_id: str | None
    layer: int | str | None
    policies: str | None
    holdout: Mapping[str, float] = MappingProxyType({})  # by policy, as name@version
    dose: Dose | None = None

    def read_policies(self) -> list[tuple[Policy, float]]:
        """The policies of the file, each with the share of its requests that stay unsteered."""
        given = [] if self.policies is None else Policy.from_file(self.policies)
        listed = given if isinstance(given, list) else [given]
        labels = [policy.label for policy in listed]
        for label in self.holdout:
            if label not in labels:
                raise FastsaeError(
                    f"holdout: there is no policy {label!r} in the policies file; it has "
                    f"{', '.join(labels) or 'none'}"
                )
        return [(policy, self.holdout.get(policy.label, 0.0)) for policy in listed]

    def load_sae(self):
        from fastsae.sae import SAE

        return SAE.from_pretrained(self.sae, self.sae_id)


class Settings(NamedTuple):
    sites: tuple[SiteSettings, ...]
    capacity: Capacity  # per site
    membership: int  # operations of one policy that may ask a top-k SAE for its own activation
    first_token: bool
    max_strength: float
    admin_keys: str | None  # a file with a key per line
    audit: str | None  # a file that gets a line per request that names a policy
    latency_budget_ms: float | None = None  # per token; above it optional policies are dropped
    watch: int = FEATURES  # features of a policy to watch; 0: no watching

    def read_admin_keys(self) -> list[str]:
        if self.admin_keys is None:
            return []
        try:
            lines = Path(self.admin_keys).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise FastsaeError(f"fastsae.admin_keys: cannot read the file: {error}") from error
        return [line.strip() for line in lines if line.strip()]


_SITE = ("sae", "sae_id", "layer", "policies", "holdout", "dose")
_ALL = ("sites", *Capacity._fields, "membership", "first_token", "max_strength")
_ALL += ("admin_keys", "audit", "latency_budget_ms", "watch")


def from_config(additional_config: Any) -> Settings | None:
    """The settings, or None when the operator did not ask for fastsae. Unknown keys are errors."""
    given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
    if given is None:
        return None
    fields = _known("fastsae", given, _ALL)
    sites = fields.get("sites")
    if not isinstance(sites, list) or not sites:
        raise FastsaeError('fastsae.sites: expected a list such as [{"sae": "folder", "layer": 2}]')
    membership = fields.get("membership", 0)
    if isinstance(membership, bool) or not isinstance(membership, int) or membership < 0:
        raise FastsaeError(f"fastsae.membership: expected an integer ≥ 0, got {membership!r}")
    first_token = fields.get("first_token", False)
    if not isinstance(first_token, bool):
        raise FastsaeError(f"fastsae.first_token: expected true or false, got {first_token!r}")
    strongest = fields.get("max_strength", 100.0)
    if not is_number(strongest) or strongest <= 0:
        raise FastsaeError(f"fastsae.max_strength: expected a number above 0, got {strongest!r}")
    budget = fields.get("latency_budget_ms")
    if budget is not None and (not is_number(budget) or budget <= 0):
        raise FastsaeError(f"fastsae.latency_budget_ms: expected a number above 0, got {budget!r}")
    watch = fields.get("watch", FEATURES)
    if isinstance(watch, bool) or not isinstance(watch, int) or watch < 0:
        raise FastsaeError(f"fastsae.watch: expected an integer ≥ 0, got {watch!r}")
    return Settings(
        tuple(_site(f"fastsae.sites[{i}]", site, watch) for i, site in enumerate(sites)),
        Capacity(**{n: fields[n] for n in Capacity._fields if n in fields}).checked(),
        membership,
        first_token,
        float(strongest),
        _text("fastsae.admin_keys", fields.get("admin_keys")),
        _text("fastsae.audit", fields.get("audit")),
        budget,
        watch,
    )


def is_number(given: Any) -> bool:
    number = isinstance(given, int | float) and not isinstance(given, bool)
    return number and math.isfinite(given)


def _known(where: str, given: Any, names: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise FastsaeError(f"{where}: expected a JSON object, got {given!r}")
    for name in given:
        if name not in names:
            raise FastsaeError(f"{where}: unknown key {name!r}; accepted are {', '.join(names)}")
    return given


def _site(where: str, given: Any, watch: int) -> SiteSettings:
    fields = _known(where, given, _SITE)
    if "sae" not in fields:
        raise FastsaeError(f"{where}.sae: missing; name a folder or a repository")
    texts = {n: _text(f"{where}.{n}", fields.get(n)) for n in ("sae", "sae_id", "policies")}
    layer = fields.get("layer")
    if layer is not None:
        resolve_hook(layer)
    shares = fields.get("holdout", {})
    if not isinstance(shares, Mapping):
        raise FastsaeError(f'{where}.holdout: expected {{"name@version": share}}, got {shares!r}')
    holdout = {}
    for label, share in shares.items():
        try:
            holdout[label] = checked_holdout(share, False)
        except FastsaeError as error:
            raise FastsaeError(f"{where}.holdout[{label!r}]: {error}") from error
    dose = _dose(f"{where}.dose", fields.get("dose"), watch)
    return SiteSettings(layer=layer, holdout=holdout, dose=dose, **texts)


def _dose(where: str, given: Any, watch: int) -> Dose | None:
    if given is None:
        return None
    fields = _known(where, given, ("limit", "action"))
    try:
        dose = Dose(fields.get("limit"), fields.get("action", "warn"))
    except FastsaeError as error:
        raise FastsaeError(f"{where}.{error}") from error
    if dose.action == "refuse":
        raise FastsaeError(
            f'{where}.action: "refuse" must fail one request of a batch, saying why, and vLLM has '
            'no way from a forward back to the scheduler; use "clamp", or fastsae serve'
        )
    if dose.action == "warn" and not watch:
        raise FastsaeError(f'{where}.action: "warn" needs watching; leave fastsae.watch above 0')
    return dose


def _text(where: str, given: Any) -> str | None:
    if given is not None and (not isinstance(given, str) or not given):
        raise FastsaeError(f"{where}: expected a text, got {given!r}")
    return given


def layer_after(site: SiteSettings, trained_at: str | None) -> int:
    """The decoder layer whose output is the site's residual; an input is the output before it."""
    place = site.layer if site.layer is not None else trained_at
    if place is None:
        raise FastsaeError(
            f"layer: the SAE {site.sae} does not say where it was trained; "
            'name it, {"sae": …, "layer": 12}'
        )
    hook = resolve_hook(place)
    if isinstance(site.layer, int) and trained_at is not None:
        try:
            trained = resolve_hook(trained_at)
        except FastsaeError:
            trained = hook
        hook = trained if trained.layer == hook.layer else hook
    if hook == Hook(0, "input"):
        raise FastsaeError(
            "layer: the input of layer 0 is the embedding, which this plugin does not see; "
            "take the output of a layer"
        )
    return hook.layer if hook.side == "output" else hook.layer - 1
