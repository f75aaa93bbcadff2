"""In every worker: arm the model's layers once, fill their rows before every forward."""

import functools
import hashlib
import json
import logging

import torch

from fastsae import models
from fastsae.errors import FastsaeError
from fastsae.steering.dose import Dose
from fastsae.steering.policy import Policy
from fastsae.steering.vllm import settings as config
from fastsae.steering.vllm.batch import BatchView
from fastsae.steering.vllm.layer import SteeredLayer
from fastsae.steering.vllm.settings import KEY, Settings
from fastsae.steering.vllm.step import Applied

log = logging.getLogger("vllm.plugins.fastsae")  # below vLLM's own, so that it is shown
GRAPH = 3  # counts changes of what `SteeredLayer.forward` and its op put into a graph


class Steered:
    """One running request's policy, as rows need it."""

    def __init__(self, site: int, policy: Policy, strength: float, prompt: int, applied: Applied):
        self.site, self.policy, self.strength = site, policy, strength
        self.prompt, self.applied = prompt, applied

    def rows(self, begin: int, tokens: int, position: int, first: int) -> tuple[int, int]:
        """The steered rows among `tokens` rows from `begin`: positions in the policy's phase."""
        low = max(first, self.prompt if self.policy.phase == "generated" else 0)
        high = self.prompt if self.policy.phase == "prompt" else position + tokens
        low, high = max(low, position), min(high, position + tokens)
        return begin + low - position, begin + max(low, high) - position


class WorkerSteering:
    """The armed layers of one worker and the steered requests in its batch."""

    def __init__(self, settings: Settings, layers: dict[int, SteeredLayer], where: dict[int, int]):
        self.settings = settings
        self.layers = layers  # by site; with pipeline parallelism only those this rank runs
        self.where = where
        self.requests: dict[str, Steered] = {}
        self.steered_rows = 0
        self.seen_rows = 0
        self.warned: set[str] = set()  # digests

    def finish(self, requests) -> None:
        for request in requests:
            gone = self.requests.pop(request, None)
            if gone is not None:
                self._warn(gone)
                self.layers[gone.site].release(gone.policy)

    def _warn(self, gone: Steered) -> None:
        """Once per policy, when a request of it ends; reads two numbers from the device."""
        layer, policy = self.layers[gone.site], gone.policy
        dose = layer.dose
        if dose is None or dose.action != "warn" or policy.digest in self.warned:
            return
        most = layer.largest_dose(policy)
        if most > dose.limit:
            self.warned.add(policy.digest)
            log.warning(
                "dose: policy %s moved a token by %.3g times its length, above the limit of %g; "
                "lower the strength, raise the limit, or clamp",
                policy.label,
                most,
                dose.limit,
            )

    def begin(self, view: BatchView) -> None:
        """Before a forward: its rows get the slots of their requests' policies."""
        self.finish(view.finished)
        for new in view.started:
            self.finish([new.request])
            wish = None if new.extra_args is None else new.extra_args.get(KEY)
            if wish is not None:
                self._start(new.request, *resolved(wish), new.prompt_tokens)
        spans: dict[int, list] = {site: [] for site in self.layers}
        if self.requests:
            first = 0 if self.settings.first_token else 1
            for span in view.spans():
                steered = self.requests.get(span.request)
                self.seen_rows += span.tokens
                if steered is not None:
                    begin, end = steered.rows(span.begin, span.tokens, span.position, first)
                    self.steered_rows += end - begin
                    if end > begin:
                        row = (begin, end, steered.applied, steered.strength)
                        spans[steered.site].append(row)
        for site, layer in self.layers.items():
            layer.fill(spans[site])

    def clear(self) -> None:
        """Dummy forwards steer nothing."""
        for layer in self.layers.values():
            layer.fill([])

    def _start(self, request, site: int, policy: Policy, strength, watch, prompt: int) -> None:
        layer = self.layers.get(site)
        if layer is None:
            return  # another pipeline stage runs that layer
        applied = layer.acquire(policy, watch)
        self.requests[request] = Steered(site, policy, strength, prompt, applied)

    def command(self, text: str) -> str:
        """What the engine asks of every worker; JSON in and out."""
        asked = json.loads(text)
        if asked["do"] == "check":
            layer = self.layers.get(asked["site"])
            if layer is None:
                return json.dumps({"absent": True})
            try:
                policy = Policy.from_dict(asked["policy"])
                slots, rows, items = layer.check(policy, asked["watch"])
            except FastsaeError as error:
                return json.dumps({"error": str(error)})
            return json.dumps({"slots": slots, "rows": sorted(rows), "items": items})
        if asked["do"] == "forget":
            if asked["site"] in self.layers:
                self.layers[asked["site"]].forget(asked["digest"])
            return "{}"
        if asked["do"] == "watch":
            watched = {site: layer.numbers() for site, layer in self.layers.items()}
            return json.dumps(watched)
        return json.dumps(
            {
                "sites": [
                    {"site": site, "layer": self.where[site], "digest": self.layers[site].digest}
                    for site in self.layers
                ],
                "requests": len(self.requests),
                "policies": sum(len(layer.applied) for layer in self.layers.values()),
                "steered_rows": self.steered_rows,
                "seen_rows": self.seen_rows,
            }
        )


@functools.lru_cache(maxsize=256)
def resolved(text: str) -> tuple[int, Policy, float, tuple[int, ...]]:
    """Site, policy, strength and features to watch, as the engine tells a request's."""
    told = json.loads(text)
    policy = Policy.from_dict(told["policy"])
    return told["site"], policy, told["strength"], tuple(told.get("watch", ()))


def arm(runner, model) -> WorkerSteering | None:
    """Put the SAEs on the model's layers; None when the operator asked for none."""
    vllm_config = runner.vllm_config
    settings = config.from_config(vllm_config.additional_config)
    if settings is None:
        return None
    _refuse_sequence_parallel(vllm_config, model)
    layers, where = {}, {}
    for site, asked in enumerate(settings.sites):
        sae = asked.load_sae()
        after = config.layer_after(asked, sae.config.hook_name)
        module, _ = models.hook_module(model, after)
        where[site] = after
        width = vllm_config.model_config.get_hidden_size()
        if sae.config.d_in != width:
            raise FastsaeError(
                f"fastsae.sites[{site}].sae: reads {sae.config.d_in} dimensions, the model has "
                f"{width}; take an SAE trained on this model"
            )
        if type(module).__name__ == "PPMissingLayer":
            continue
        layer = SteeredLayer(
            sae,
            settings.capacity,
            settings.membership,
            runner.max_num_tokens,
            runner.device,
            asked.dose,
            settings.watch,
        )
        layer.digest = fingerprint(sae, after, settings.first_token, asked.dose)
        module.add_module(f"fastsae_{site}", layer)
        module.register_forward_hook(layer.hook)
        layers[site] = layer
    # vLLM's compile cache goes by this configuration and knows nothing of plugins.
    vllm_config.additional_config["fastsae_graph"] = graph_digest(settings, layers, where)
    return WorkerSteering(settings, layers, where)


def fingerprint(sae, layer: int, first_token: bool, dose: Dose | None = None) -> str:
    """sha256 of the SAE's weights and of where and how it is applied."""
    c = sae.config
    about = [c.activation, c.k, c.apply_b_dec_to_input, layer, first_token]
    about += [dose.limit] if dose is not None and dose.action == "clamp" else []
    digest = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(sae.named_parameters()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def graph_digest(settings: Settings, layers: dict[int, SteeredLayer], where) -> str:
    """Whatever shapes the traced graph: a change must not find the artifact of another."""
    about = [GRAPH, settings.capacity, settings.membership, sorted(where.items()), settings.watch]
    for _, layer in sorted(layers.items()):
        c = layer.sae.config
        about.append([c.d_in, c.d_sae, c.activation, c.k, c.dtype])
        about.append(layer.dose and [layer.dose.limit, layer.dose.action])
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _refuse_sequence_parallel(vllm_config, model) -> None:
    """Where every rank holds other tokens of the residual, rows cannot be told apart."""
    parallel, passes = vllm_config.parallel_config, vllm_config.compilation_config.pass_config
    split = parallel.tensor_parallel_size > 1 and any(
        getattr(module, "is_sequence_parallel", False) for module in model.modules()
    )
    if parallel.use_sequence_parallel_moe or getattr(passes, "enable_sp", False) or split:
        raise FastsaeError(
            "model: its residual is split over tokens (sequence parallel); fastsae steers only "
            "replicated residuals, turn sequence parallelism off"
        )
