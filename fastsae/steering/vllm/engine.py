"""In the engine's process: which policies there are, who may start, who shares cache blocks."""

import copy
import json
import threading
from collections import OrderedDict
from collections.abc import Sequence

from fastsae.errors import FastsaeError
from fastsae.steering.control import checked_holdout
from fastsae.steering.policy import Policy
from fastsae.steering.vllm.requests import (
    Footprint,
    Ledger,
    Loaded,
    Registry,
    Wish,
    cache_salt,
)
from fastsae.steering.vllm.settings import KEY, Settings


class EngineSteering:
    """Beside one EngineCore. Requests name a policy; what reaches the workers is the policy."""

    def __init__(self, core, settings: Settings):
        self.core, self.settings = core, settings
        self.registry = Registry()
        self.lock = threading.Lock()  # requests are resolved in the thread that receives them
        self.sites = self._armed()
        for site, asked in enumerate(settings.sites):
            for policy, holdout in asked.read_policies():
                self.load(site, policy, holdout, replace=False)

    def _workers(self, **asked) -> list[dict]:
        answers = self.core.model_executor.collective_rpc(KEY, args=(json.dumps(asked),))
        return [json.loads(answer) for answer in answers]

    def _armed(self) -> list[dict]:
        """Every site as the workers armed it; a site nobody armed stops the start."""
        found: dict[int, dict] = {}
        for rank, answer in enumerate(self._workers(do="status")):
            for site in answer["sites"]:
                before = found.setdefault(site["site"], site)
                if before != site:
                    raise FastsaeError(f"fastsae: rank {rank} armed {site}, another {before}")
        for number, asked in enumerate(self.settings.sites):
            if number not in found:
                raise FastsaeError(f"fastsae.sites[{number}]: no worker runs the layer of {asked}")
        return [found[number] for number in range(len(self.settings.sites))]

    # --- requests -------------------------------------------------------------------------------

    def resolve(self, request) -> Loaded | None:
        """Name → policy, and the cache salt of requests steered like this one. None: strength 0."""
        params = copy.copy(request.sampling_params)
        params.extra_args = dict(params.extra_args)
        wish = Wish.of(params.extra_args.pop(KEY), self.settings.max_strength, found=True)
        with self.lock:
            loaded = self.registry.looked_up(wish.policy, wish.digest)
        if wish.strength:
            resolved = {
                "site": loaded.site,
                "policy": loaded.policy.to_dict(),
                "strength": wish.strength,
                "watch": loaded.watch,
            }
            params.extra_args[KEY] = json.dumps(resolved)
            request.cache_salt = cache_salt(
                request.cache_salt,
                self.sites[loaded.site]["digest"],
                loaded.policy,
                wish.strength,
            )
        request.sampling_params = params
        return loaded if wish.strength else None

    # --- commands -------------------------------------------------------------------------------

    def command(self, text: str) -> str:
        """Status, load, replace and delete; JSON in and out, a mistake as {"error": …}."""
        try:
            asked = json.loads(text)
            match asked:
                case {"do": "status"}:
                    return json.dumps(self.status())
                case {"do": "watch"}:
                    return json.dumps({"watched": self.watched()})
                case {"do": "load" | "replace" as do, "site": int(site), "policy": spelled}:
                    if not 0 <= site < len(self.settings.sites):
                        raise FastsaeError(
                            f"site: got {site}, this server has {len(self.settings.sites)}"
                        )
                    more = asked.get("holdout", 0.0), asked.get("watch", ())
                    policy = Policy.from_dict(spelled)
                    loaded = self.load(site, policy, *more, replace=do == "replace")
                    return json.dumps(_described(loaded))
                case {"do": "delete", "policy": str(label)}:
                    with self.lock:
                        gone = self.registry.remove(label)
                    self._forget(gone)
                    return json.dumps(_described(gone))
            raise FastsaeError(f"fastsae: unknown command {text[:200]!r}")
        except FastsaeError as error:
            return json.dumps({"error": str(error)})

    def load(
        self,
        site: int,
        policy: Policy,
        holdout: float = 0.0,
        watch: Sequence[int] = (),
        *,
        replace: bool,
    ) -> Loaded:
        listed = watch if isinstance(watch, list | tuple) else ("no list",)
        if any(type(feature) is not int or feature < 0 for feature in listed):
            raise FastsaeError(f"watch: expected a list of features ≥ 0, got {watch!r}")
        share = checked_holdout(holdout, policy.required)
        footprint = self._checked(site, policy, tuple(watch))
        loaded = Loaded(site, policy, footprint, share, tuple(watch))
        with self.lock:
            replaced = self.registry.add(loaded, replace=replace)
        if replaced is not None:
            self._forget(replaced)
        return loaded

    def _forget(self, gone: Loaded) -> None:
        self._workers(do="forget", site=gone.site, digest=gone.policy.digest)

    def _checked(self, site: int, policy: Policy, watch: tuple[int, ...]) -> Footprint:
        answers = self._workers(do="check", site=site, policy=policy.to_dict(), watch=watch)
        answers = [answer for answer in answers if not answer.get("absent")]
        for answer in answers:
            if "error" in answer:
                raise FastsaeError(answer["error"])
        rows = frozenset((feature, own) for feature, own in answers[0]["rows"])
        return Footprint(answers[0]["slots"], rows, answers[0]["items"])

    def watched(self) -> dict:
        """What steering did to the tokens of every loaded policy, by its label.

        Of the first rank that runs a site's layer: the others repeat its work.
        """
        found: dict[str, dict] = {}
        for answer in self._workers(do="watch"):
            found = answer | found
        with self.lock:
            loaded = self.registry.listed()
        by_label = {}
        for each in loaded:
            numbers = found.get(str(each.site), {}).get(each.policy.digest)
            if numbers is not None:
                by_label[each.policy.label] = numbers | {"layer": self.sites[each.site]["layer"]}
        return by_label

    def status(self) -> dict:
        workers = self._workers(do="status")
        gate = self.core.scheduler.fastsae
        with self.lock:
            policies = [
                _described(loaded) | {"replaced": self.registry.replaced(loaded.policy.label)}
                for loaded in self.registry.listed()
            ]
        return {
            "armed": {site["site"] for worker in workers for site in worker["sites"]}
            == set(range(len(self.settings.sites))),
            "sites": self.sites,
            "policies": policies,
            "in_use": [ledger.in_use for ledger in gate.ledgers],
            "held": len(gate.held),
            "workers": workers,
        }


def _described(loaded: Loaded) -> dict:
    policy = loaded.policy
    return {
        "policy": policy.label,
        "name": policy.name,
        "version": policy.version,
        "digest": policy.digest,
        "site": loaded.site,
        "required": policy.required,
        "holdout": loaded.holdout,
        "watch": loaded.watch,
    }


class Gate:
    """In front of the scheduler: a request whose policy finds no room waits here, in its turn."""

    def __init__(self, scheduler, settings: Settings):
        c = settings.capacity
        self.scheduler = scheduler
        self.ledgers = [Ledger(c.max_policies, c.max_features, c.max_items) for _ in settings.sites]
        self.admitted: dict[str, Loaded] = {}
        self.held: OrderedDict[str, object] = OrderedDict()
        self._add, self._free = scheduler.add_request, scheduler._free_request
        self._finish, self._schedule = scheduler.finish_requests, scheduler.schedule
        self._unfinished = scheduler.get_num_unfinished_requests
        scheduler.add_request, scheduler._free_request = self.add_request, self.free_request
        scheduler.finish_requests, scheduler.schedule = self.finish_requests, self.schedule
        scheduler.get_num_unfinished_requests = self.unfinished

    def add_request(self, request) -> None:
        if getattr(request, KEY, None) is None or request.request_id in self.admitted:
            return self._add(request)
        if self.held or not self._admit(request):
            self.held[request.request_id] = request
            return None
        return self._add(request)

    def _admit(self, request) -> bool:
        loaded: Loaded = request.fastsae
        ledger = self.ledgers[loaded.site]
        if not ledger.acquire(loaded.policy.digest, loaded.footprint):
            return False
        self.admitted[request.request_id] = loaded
        return True

    def schedule(self, *args, **kwargs):
        while self.held and self._admit(next(iter(self.held.values()))):
            self._add(self.held.popitem(last=False)[1])
        return self._schedule(*args, **kwargs)

    def free_request(self, request, *args, **kwargs):
        loaded = self.admitted.pop(request.request_id, None)
        if loaded is not None:
            self.ledgers[loaded.site].release(loaded.policy.digest)
        return self._free(request, *args, **kwargs)

    def finish_requests(self, request_ids, finished_status):
        if request_ids is not None:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
        dropped = []
        for name in list(self.held) if request_ids is None else request_ids:
            request = self.held.pop(name, None)
            if request is not None:
                request.status = finished_status
                dropped.append(request)
        return self._finish(request_ids, finished_status) + dropped

    def unfinished(self) -> int:
        from vllm.v1.core.sched.interface import PauseState

        waiting = len(self.held) if self.scheduler.pause_state == PauseState.UNPAUSED else 0
        return self._unfinished() + waiting
