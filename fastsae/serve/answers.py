"""Answers in the shape of OpenAI's API, whole or as server-sent events."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from fastsae.serve.errors import ApiError
from fastsae.serve.running import Piece, merged
from fastsae.serve.seats import Job
from fastsae.serve.state import Server


@dataclass(frozen=True)
class Shape:
    """How answers to one request look."""

    key: str
    model: str
    chat: bool
    steering: dict

    def head(self, kind: str) -> dict:
        name = ("chat.completion" if self.chat else "text_completion") + kind
        name = "text_completion" if not self.chat else name
        prefix = "chatcmpl-" if self.chat else "cmpl-"
        created = {"created": int(time.time()), "model": self.model}
        return {"id": prefix + self.key, "object": name, **created}

    def chunk(self, piece: Piece, first: bool) -> dict:
        choice = {"index": piece.index, "finish_reason": piece.reason, "logprobs": None}
        if self.chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = role | ({"content": piece.text} if piece.text or first else {})
        else:
            choice["text"] = piece.text
        steering = {"steering": self.steering} if first else {}
        return self.head(".chunk") | {"choices": [choice]} | steering


def _usage(jobs: list[Job], drawn: dict[int, int]) -> dict:
    prompt, new = sum(len(job.tokens) for job in jobs), sum(drawn.values())
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def whole(server: Server, request: Request, jobs, fields, shape: Shape) -> Response:
    texts = [""] * len(jobs)
    reasons: list[str | None] = [None] * len(jobs)
    drawn: dict[int, int] = {}

    async def run() -> None:
        async with contextlib.aclosing(merged(server, jobs, fields.stops)) as found:
            async for piece in found:
                texts[piece.index] += piece.text
                reasons[piece.index], drawn[piece.index] = piece.reason, piece.tokens

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, leave = asyncio.create_task(run()), asyncio.create_task(gone())
    try:
        await asyncio.wait((work, leave), return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return Response(status_code=499)  # nobody reads it
        await work
    finally:
        for task in (work, leave):
            task.cancel()
        await asyncio.gather(work, leave, return_exceptions=True)
    choices = []
    for i, text in enumerate(texts):
        choice = {"index": i, "finish_reason": reasons[i], "logprobs": None}
        what = {"message": {"role": "assistant", "content": text}} if shape.chat else {"text": text}
        choices.append(choice | what)
    answer = shape.head("") | {"choices": choices, "usage": _usage(jobs, drawn)}
    return JSONResponse(answer | {"steering": shape.steering})


async def events(server, jobs, stops, shape: Shape, usage: bool, place) -> AsyncIterator[str]:
    drawn: dict[int, int] = {}
    try:
        async with contextlib.aclosing(merged(server, jobs, stops)) as found:
            async for piece in found:
                yield _event(shape.chunk(piece, piece.index not in drawn))
                drawn[piece.index] = piece.tokens
        if usage:
            yield _event(shape.head(".chunk") | {"choices": [], "usage": _usage(jobs, drawn)})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body())
    finally:
        place.__exit__(None, None, None)


def _event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
