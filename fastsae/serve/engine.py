"""A Hugging Face model under continuous batching, each request steered by its own policy."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastsae.errors import FastsaeError
from fastsae.sae import SAE
from fastsae.serve.policies import Entry
from fastsae.serve.sampling import Drawing, sampler
from fastsae.serve.seats import EngineError, Job, Seats

log = logging.getLogger("uvicorn.error")

PAGE = 64  # tokens of a block of the cache


class Engine:
    """Runs jobs from `start` to `stop`, in a thread of its own.

    model: a causal LM of transformers, with its tokenizer. saes: {layer: SAE}, attached for good.
    cache_tokens: tokens of all running requests together that the cache holds; more requests wait.
    """

    def __init__(
        self,
        model,
        tokenizer,
        saes: Mapping[int | str, SAE],
        *,
        max_batch: int = 32,
        max_batch_tokens: int = 512,
        cache_tokens: int = 16384,
        max_policies: int = 64,
    ):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from fastsae.steering import attach

        self.model, self.tokenizer = model, tokenizer
        self.layers = tuple(saes)
        self.handle = attach(model, saes, max_policies=max_policies, watch=True)
        self.eos = _end_tokens(model)
        config = getattr(model.config, "get_text_config", lambda: model.config)()
        longest = getattr(config, "max_position_embeddings", None) or cache_tokens
        self.context = min(longest, cache_tokens)
        self._sampling: dict[str, Drawing] = {}
        self._seats = Seats(self.handle, dict(zip(saes, self.handle.sites, strict=True)))
        self.observe: Callable[[float], None] = lambda seconds: None  # steering, of every forward
        self.handle.observe(lambda seconds: self.observe(seconds))
        self._admissions: list[tuple[Job, asyncio.Future]] = []
        self._admitting: asyncio.Task | None = None
        # Two requests with one prompt and two policies must not share what was computed of it; and
        # the sampler and the policies of a step are set on the host, between steps.
        self._batching = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=-(-cache_tokens // PAGE),
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_batch,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        self._generation = GenerationConfig(
            do_sample=False, eos_token_id=list(self.eos) or None, max_new_tokens=self.context
        )
        self.manager: Any = None
        self._stopping: Any = None
        self._pausing = threading.Lock()

    def check(self, entry: Entry) -> None:
        """Raises FastsaeError if the entry's policy cannot be applied here."""
        self._seats.check(entry)

    def start(self) -> None:
        self.manager = self.model.init_continuous_batching(
            generation_config=self._generation, continuous_batching_config=self._batching
        )
        processors = self.manager.logit_processor
        processors.logits_processor.append(sampler(self._sampling))
        processors.tensors_required += 1
        processors.do_processing = True
        self.manager.output_router.output_queue = _Nowhere()
        self.manager.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread; requests that still run fail.

        A forward that is under way after `timeout` seconds keeps the hooks, so that it ends steered
        as it began; a later `stop` waits for it again.
        """
        if self.manager is not None:
            self._stopping, self.manager = self.manager, None
        if self._stopping is not None:
            until = time.monotonic() + timeout
            if self._pausing.acquire(timeout=timeout):  # nobody is seated meanwhile
                self._pausing.release()
                left = max(0.0, until - time.monotonic())
                self._stopping.stop(block=True, timeout=left, hard_stop=True)
            if self._stopping.is_running():
                log.warning(
                    "the engine's thread still runs after %g s: the model stays hooked; call stop "
                    "again, or end the process", timeout,
                )  # fmt: skip
                return
            self._stopping = None
        self.handle.detach()

    @property
    def alive(self) -> bool:
        return self.manager is not None and self.manager.is_running()

    async def run(self, job: Job) -> AsyncIterator[int]:
        """The job's tokens as they are drawn, its end-of-sequence token included.

        Leaving the iteration cancels the job. Raises EngineError when it fails, and when more or
        fewer of its tokens were steered than its policy asks for; EngineFull when its policy finds
        no room.
        """
        if not self.alive:
            raise EngineError("the engine is not running")
        results: asyncio.Queue = asyncio.Queue()
        drawing = self._sampling[job.id] = Drawing(job.sampling)
        ended, drawn = False, 0
        try:
            self.manager.register_result_handler(job.id, results.put_nowait)
            await self._admit(job)
            while not ended:
                output = await results.get()
                ended = output.is_finished()
                if output.error:
                    raise EngineError(output.error)
                if drawing.broken:
                    raise EngineError("logits are not finite: a strength is far too large")
                self._seats.verify(job, len(output.generated_tokens), output.steered)
                for token in output.generated_tokens[drawn:]:
                    drawn += 1
                    yield token
        finally:
            if not ended and self.manager is not None:
                self.manager.cancel_request(job.id)
                with self.manager.output_router._lock:
                    self.manager.output_router.result_handlers.pop(job.id, None)
            self._sampling.pop(job.id, None)
            self._seats.leave(job)

    async def _admit(self, job: Job) -> None:
        """Seats the job between two steps; jobs that arrive meanwhile are seated together."""
        seated = asyncio.get_running_loop().create_future()
        self._admissions.append((job, seated))
        if self._admitting is None or self._admitting.done():
            self._admitting = asyncio.create_task(self._admit_all())
        try:
            await asyncio.shield(seated)
        except asyncio.CancelledError:
            # It may be seated a moment later, when nobody is there any more to cancel it.
            seated.add_done_callback(lambda done: self._drop(job, done))
            raise

    def _drop(self, job: Job, seated: asyncio.Future) -> None:
        if seated.cancelled() or seated.exception() is not None or self.manager is None:
            return
        self.manager.cancel_request(job.id)
        self._seats.leave(job)

    async def _admit_all(self) -> None:
        while self._admissions:
            arrived, self._admissions = self._admissions, []
            errors = await asyncio.to_thread(self._seat, [job for job, _ in arrived])
            for (_, seated), error in zip(arrived, errors, strict=True):
                if seated.cancelled():
                    continue
                if error is None:
                    seated.set_result(None)
                else:
                    seated.set_exception(error)

    def _seat(self, jobs: list[Job]) -> list[Exception | None]:
        try:
            with self._pausing, self.manager.pause():
                errors = self._seats.take(jobs, self.manager)
                for job, error in zip(jobs, errors, strict=True):
                    if error is None:
                        self.manager.add_request(
                            list(job.tokens),
                            request_id=job.id,
                            max_new_tokens=job.max_tokens,
                            streaming=True,
                            eos_token_id=list(self.eos) or -1,
                        )
                if not self.alive:
                    raise RuntimeError("the engine stops")
                return errors
        except Exception as error:  # the thread of the engine has ended, or is ending
            return [EngineError(f"not admitted: {error}")] * len(jobs)

    def forget(self, entry: Entry) -> None:
        """The entry is not served any more: what was watched of its policy goes."""
        self._seats.forget(entry)

    def watched(self) -> dict[tuple[int | str, str], dict[str, Any]]:
        """{(layer, policy digest): gates, features and doses} as fastsae.steering.watch reads
        them; within one forward's tokens while one runs."""
        return self._seats.watched()

    def counters(self) -> dict[str, int]:
        """Tokens steered since the start, by policy id."""
        return dict(self._seats.totals)


class _Nowhere:
    """For outputs of requests that have left: the manager would keep them for a reader."""

    def put(self, output) -> None:
        pass

    def empty(self) -> bool:
        return True


def _end_tokens(model) -> tuple[int, ...]:
    given = getattr(model.generation_config, "eos_token_id", None)
    given = model.config.eos_token_id if given is None else given
    if given is None:
        return ()
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def chat_tokens(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """A conversation as the model was trained to read it."""
    if not getattr(tokenizer, "chat_template", None):
        raise FastsaeError(
            "messages: this model has no chat template; use /v1/completions, or give one with "
            "--chat-template"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates raise what they like: roles must alternate, and so on
        raise FastsaeError(f"messages: the chat template refuses them: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]
