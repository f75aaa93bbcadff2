"""The routes of OpenAI's API that fastsae serves."""

import asyncio
import contextlib
import uuid

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse

from fastsae.errors import FastsaeError
from fastsae.serve.admin import add_admin_routes
from fastsae.serve.answers import Shape, events, whole
from fastsae.serve.audit import Audit
from fastsae.serve.engine import Engine, chat_tokens
from fastsae.serve.errors import ApiError
from fastsae.serve.policies import PolicyStore
from fastsae.serve.schemas import ChatCompletion, Completion
from fastsae.serve.state import Server, Settings
from fastsae.steering.control import described


def create_app(
    engine: Engine,
    store: PolicyStore,
    settings: Settings,
    *,
    audit: Audit | None = None,
    explanations=None,
) -> FastAPI:
    """The application; it starts the engine with itself and stops it when it ends.

    | route | |
    |---|---|
    | POST /v1/chat/completions, /v1/completions | OpenAI's, with `"steering"` in the body |
    | GET /v1/models, /health, /ready, /metrics | |
    | /fastsae/... | admin.py |
    """
    server = Server(engine, store, settings, audit or Audit(None), explanations)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        await asyncio.to_thread(engine.start)
        try:
            yield
        finally:
            await asyncio.to_thread(engine.stop)
            server.audit.close()

    app = FastAPI(title="fastsae", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = server

    @app.exception_handler(ApiError)
    async def failed(request: Request, error: ApiError) -> JSONResponse:
        server.metrics.refused.labels(error.status).inc()
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        answer = ApiError(400, f"{first['loc'][-1]}: {first['msg']}", str(first["loc"][-1]))
        return JSONResponse(answer.body(), 400)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: Request, error) -> JSONResponse:
        answer = ApiError(error.status_code, f"{request.method} {request.url.path}: no such route")
        return JSONResponse(answer.body(), error.status_code)

    async def complete(request: Request, kind) -> Response:
        server.authorise(request, settings.keys)
        fields = server.parse(kind, await server.body(request))
        chat = kind is ChatCompletion
        key = uuid.uuid4().hex
        try:
            prompts = await asyncio.to_thread(_prompts, engine.tokenizer, fields)
        except FastsaeError as error:
            raise ApiError(400, str(error), "messages" if chat else "prompt") from None
        jobs = server.jobs(fields, prompts, fields.most if chat else fields.max_tokens, key)
        shape = Shape(key, settings.model_name, chat, described(jobs[0].decision))
        if not fields.stream:
            with server.admitted(len(jobs)):
                return await whole(server, request, jobs, fields, shape)
        place = server.admitted(len(jobs))
        place.__enter__()
        usage = fields.stream_options is not None and fields.stream_options.include_usage
        found = events(server, jobs, fields.stops, shape, usage, place)
        return StreamingResponse(found, media_type="text/event-stream")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        return await complete(request, ChatCompletion)

    @app.post("/v1/completions")
    async def completions(request: Request):
        return await complete(request, Completion)

    @app.get("/v1/models")
    async def models(request: Request):
        server.authorise(request, settings.keys)
        one = {"id": settings.model_name, "object": "model", "owned_by": "fastsae"}
        return {"object": "list", "data": [one | {"created": server.started}]}

    @app.get("/health")
    async def health():
        if not engine.alive:
            raise ApiError(503, "the engine has stopped; restart the server")
        return {"status": "ok"}

    @app.get("/ready")
    async def ready():
        if not engine.alive or server.running >= settings.max_running:
            raise ApiError(503, "not now")
        return {"status": "ready", "running": server.running}

    @app.get("/metrics")
    async def metrics():
        for policy, tokens in engine.counters().items():
            server.metrics.steered.labels(policy).set(tokens)
        text = await asyncio.to_thread(server.metrics.text)  # may wait for the device
        return Response(text, media_type="text/plain; version=0.0.4")

    add_admin_routes(app, server)
    return app


def _prompts(tokenizer, fields) -> list[list[int]]:
    if isinstance(fields, ChatCompletion):
        messages = [{"role": m.role, "content": m.text} for m in fields.messages]
        return [chat_tokens(tokenizer, messages)]
    known = len(tokenizer)
    found = []
    for prompt in fields.prompts:
        if isinstance(prompt, str):
            prompt = tokenizer(prompt)["input_ids"]
        elif not all(0 <= token < known for token in prompt):
            raise FastsaeError(f"prompt: tokens must lie in [0, {known})")
        found.append(prompt)
    return found
