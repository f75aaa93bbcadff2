"""Jobs from admission to their end: pieces of text, metrics, the audit line."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastsae.serve.errors import ApiError
from fastsae.serve.metrics import UNSTEERED
from fastsae.serve.seats import EngineError, EngineFull, Job
from fastsae.serve.state import Server
from fastsae.serve.text import TextStream
from fastsae.steering.control import described

log = logging.getLogger("uvicorn.error")


@dataclass
class Piece:
    """A bit of one choice: text, and at its end why it ended."""

    index: int
    text: str
    reason: str | None = None
    tokens: int = 0  # drawn so far


async def pieces(server: Server, job: Job, index: int, stops: list[str]) -> AsyncIterator[Piece]:
    """Runs a job; metrics and the audit line are written however it ends."""
    metrics, decision = server.metrics, job.decision
    labels = (decision.entry.id if decision.entry else UNSTEERED, decision.reason)
    stream = TextStream(server.engine.tokenizer, job.tokens, stops)
    begun = last = time.monotonic()
    drawn, outcome = 0, "cancelled"
    try:
        async with asyncio.timeout(server.settings.timeout):
            async with contextlib.aclosing(server.engine.run(job)) as tokens:
                async for token in tokens:
                    drawn, now = drawn + 1, time.monotonic()
                    (metrics.first if drawn == 1 else metrics.between).labels(*labels).observe(
                        now - last
                    )
                    if drawn > 1:
                        server.guard.token(1e3 * (now - last))
                    last = now
                    ends = token in server.engine.eos
                    text = "" if ends else stream.feed(token)
                    if stream.stopped or ends:
                        text += stream.finish()
                        outcome = "stop"
                        yield Piece(index, text, "stop", drawn)
                        return
                    if text:
                        yield Piece(index, text, None, drawn)
        text = stream.finish()
        outcome = "stop" if stream.stopped else "length"
        yield Piece(index, text, outcome, drawn)
    except TimeoutError:
        outcome = "timeout"
        message = f"not done after {server.settings.timeout:g} s"
        raise ApiError(504, message, code="timeout") from None
    except EngineFull as error:
        outcome = "no room"
        raise ApiError(429, str(error), "steering", "too_many_policies") from None
    except EngineError as error:
        outcome = "failed"
        raise ApiError(500, str(error), code="engine") from None
    finally:
        metrics.requests.labels(*labels, outcome).inc()
        metrics.prompt_tokens.labels(*labels).inc(len(job.tokens))
        metrics.tokens.labels(*labels).inc(drawn)
        metrics.latency.labels(*labels).observe(time.monotonic() - begun)
        record = {
            "request": job.id,
            "model": server.settings.model_name,
            **described(decision),
            "prompt_tokens": len(job.tokens),
            "generated_tokens": drawn,
            "outcome": outcome,
            "seconds": round(time.monotonic() - begun, 4),
        }
        if server.audit.with_text:
            prompt = server.engine.tokenizer.decode(job.tokens)
            record |= {"prompt": prompt, "text": stream.text}
        server.audit.record(**record)


async def merged(server: Server, jobs: list[Job], stops: list[str]) -> AsyncIterator[Piece]:
    """The pieces of several jobs as they come; when one fails or nobody listens, all end."""
    queue: asyncio.Queue = asyncio.Queue()

    async def follow(job: Job, index: int) -> None:
        try:
            async with contextlib.aclosing(pieces(server, job, index, stops)) as each:
                async for piece in each:
                    await queue.put(piece)
        except ApiError as error:
            await queue.put(error)
        except Exception:
            log.exception("a request failed")
            await queue.put(ApiError(500, "internal error; see the server's log", code="internal"))

    tasks = [asyncio.create_task(follow(job, i)) for i, job in enumerate(jobs)]
    try:
        ended = 0
        while ended < len(tasks):
            piece = await queue.get()
            if isinstance(piece, ApiError):
                raise piece
            ended += piece.reason is not None
            yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
