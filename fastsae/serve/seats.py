"""Which policy steers which running request: kept in step with the batches of the engine."""

import collections
import threading
import time
import uuid
from dataclasses import dataclass, field

from fastsae.errors import FastsaeError
from fastsae.serve.policies import Entry
from fastsae.serve.sampling import Sampling
from fastsae.steering.control import Decision
from fastsae.steering.lower import check_features
from fastsae.steering.site import Rows, Site

LINGER = 10.0  # seconds that a request which was left stays named: it may be in a batch still


class EngineError(RuntimeError):
    """A request that the engine could not finish."""


class EngineFull(EngineError):
    """More policies at once than the tables hold; the request may come again."""


@dataclass(frozen=True)
class Job:
    """One prompt to continue. Ends at an end-of-sequence token or after max_tokens."""

    tokens: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    decision: Decision
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def steered_tokens(self, drawn: int) -> int:
        """Tokens that must have been steered when `drawn` are known: the last is not fed back, and
        a prompt's first token is left alone."""
        if not self.decision.steered or drawn == 0:
            return 0
        prompt, generated = len(self.tokens) - 1, drawn - 1
        phase = self.decision.entry.policy.phase
        return {"all": prompt + generated, "prompt": prompt, "generated": generated}[phase]


class Seats:
    """The jobs that the handle's policies are set for. `take` runs while the engine pauses."""

    def __init__(self, handle, places: dict):
        self.handle, self.places = handle, places  # {layer as served: where it is attached}
        self.totals: collections.Counter[str] = collections.Counter()
        self._jobs: dict[str, Job] = {}
        self._order: list[str] = []  # the row of every job, as last set
        self._gone: list[Entry] = []  # not served any more; their numbers go with the next `take`
        self._left: dict[str, float] = {}
        self._lock = threading.Lock()

    def check(self, entry: Entry) -> None:
        """Raises FastsaeError if the policy does not fit its SAE or the tables."""
        attached = self.handle.sites[self.places[entry.layer]]
        check_features(attached.sae, entry.watch)
        trial = Site(attached.sae, attached.table.capacity, attached.table.device, False, None)
        trial.set(Rows([entry.policy], [1.0], None))

    def take(self, jobs: list[Job], manager) -> list[Exception | None]:
        """Seats for jobs that are about to begin; an error for each that finds no room."""
        with self._lock:
            self._collect()
            self._clear(manager)
            while self._gone:
                entry = self._gone.pop()
                self.handle.sites[self.places[entry.layer]].watch.forget(entry.policy.digest)
            try:
                self._set([*self._jobs.values(), *jobs])
                return [None] * len(jobs)
            except FastsaeError:
                pass
            errors: list[Exception | None] = []
            for job in jobs:
                try:
                    self._set([*self._jobs.values(), job])
                    errors.append(None)
                except FastsaeError as error:
                    errors.append(EngineFull(str(error)))
            return errors

    def leave(self, job: Job) -> None:
        with self._lock:
            if job.id in self._jobs:
                self._left[job.id] = time.monotonic()

    def forget(self, entry: Entry) -> None:
        """The entry is not served any more: what was watched of it goes."""
        with self._lock:
            self._gone.append(entry)

    def watched(self) -> dict[tuple[int | str, str], dict]:
        """{(layer, policy digest): the numbers of fastsae.steering.watch}."""
        with self._lock:
            gone = {(entry.layer, entry.policy.digest) for entry in self._gone}
            numbers = self.handle.watched()
        return {
            (layer, digest): each
            for layer, place in self.places.items()
            for digest, each in numbers[str(place)].items()
            if (layer, digest) not in gone
        }

    def verify(self, job: Job, drawn: int, steered: int) -> None:
        """Raises EngineError unless the job's policy met each of its tokens, and nothing else did.

        steered: how many of the tokens that the last of `drawn` was computed from were steered,
        whether they were computed once or, after a preemption, again.
        """
        expected = job.steered_tokens(drawn)
        if steered != expected:
            of = "no policy" if job.decision.entry is None else f"policy {job.decision.entry.id}"
            raise EngineError(f"{of}: {steered} of {expected} tokens were steered")

    def _counts(self) -> dict[str, int]:
        rows = [0] * len(self._order)
        for counts in self.handle.counts().values():
            rows = [a + b for a, b in zip(rows, counts, strict=True)] if counts else rows
        return dict(zip(self._order, rows, strict=True))

    def _collect(self) -> None:
        """Adds up what `set` is about to reset."""
        for name, count in self._counts().items():
            if count:
                self.totals[self._jobs[name].decision.entry.id] += count

    def _clear(self, manager) -> None:
        """Forgets jobs that were left and are in no batch any more."""
        scheduler = manager.batch_processor.scheduler if manager.batch_processor else None
        oldest = time.monotonic() - LINGER
        for name, since in list(self._left.items()):
            running = scheduler is not None and (
                name in scheduler.active_requests or name in scheduler.waiting_requests
            )
            if since < oldest and not running:
                del self._left[name], self._jobs[name]
                self.handle.forget(name)

    def _set(self, jobs: list[Job]) -> None:
        """Sets the jobs' policies; what was set stays when that raises."""
        policies: dict = {}
        for layer, attached in self.handle.sites.items():
            policies[layer] = [self._policy(job, layer) for job in jobs]
            entries = (job.decision.entry for job in jobs if job.decision.entry is not None)
            attached.also = {entry.policy.digest: entry.watch for entry in entries}
        self.handle.set(
            policies,
            strengths=[job.decision.strength if job.decision.steered else 1.0 for job in jobs],
            requests=[job.id for job in jobs],
        )
        self._jobs = {job.id: job for job in jobs}
        self._order = list(self._jobs)

    def _policy(self, job: Job, place):
        # A job that was left keeps its slot until it is cleared: it may be in one more batch.
        entry = job.decision.entry
        if not job.decision.steered or self.places[entry.layer] != place:
            return None
        return entry.policy
