"""Routes for operators, behind keys of their own: policies, feature search, status."""

import json

from fastapi import FastAPI, Request

from fastsae.errors import FastsaeError
from fastsae.serve.errors import ApiError


def add_admin_routes(app: FastAPI, server) -> None:
    """/fastsae/policies (GET, PUT, and /{id} GET, DELETE), /fastsae/features, /fastsae/status.

    Policies arrive as JSON and are data: nothing that is uploaded is ever run or unpickled.
    Without admin keys the routes answer 403.
    """

    def authorise(request: Request) -> None:
        keys = server.settings.admin_keys
        if not keys:
            raise ApiError(403, "no admin key is configured (--admin-key-file)")
        server.authorise(request, keys)

    @app.get("/fastsae/policies")
    async def policies(request: Request):
        authorise(request)
        return {"policies": [entry.describe() for entry in server.store.all()]}

    @app.put("/fastsae/policies")
    async def put_policy(request: Request):
        authorise(request)
        try:
            document = json.loads(await server.body(request))
            json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair is no text
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"body: not JSON: {error}") from None
        try:
            return server.store.put(document).describe()
        except FastsaeError as error:
            raise ApiError(400, str(error), code="invalid_policy") from None

    @app.get("/fastsae/policies/{name}")
    async def policy(request: Request, name: str):
        authorise(request)
        return _found(server.store.get, name).describe()

    @app.delete("/fastsae/policies/{name}")
    async def delete_policy(request: Request, name: str):
        authorise(request)
        return {"deleted": _found(server.store.delete, name).id}

    @app.get("/fastsae/features")
    async def features(request: Request, query: str, top: int = 10):
        authorise(request)
        if server.explanations is None:
            raise ApiError(404, "no explanations were loaded (--explanations)")
        if not 1 <= top <= 1000:
            raise ApiError(400, f"top: expected 1 to 1000, got {top}", "top")
        try:
            found = server.explanations.search(query, top=top)
        except FastsaeError as error:
            raise ApiError(400, str(error), "query") from None
        words = server.explanations.words
        return {
            "features": [
                {"feature": f, "score": score, "words": words(f)[:10]} for f, score in found
            ]
        }

    @app.get("/fastsae/status")
    async def status(request: Request):
        authorise(request)
        return {
            "model": server.settings.model_name,
            "layers": list(server.engine.layers),
            "alive": server.engine.alive,
            "running": server.running,
            "policies": [entry.id for entry in server.store.all()],
            "latency_guard_open": server.guard.exceeded(),
            "steered_tokens": server.engine.counters(),
        }


def _found(look, name: str):
    try:
        return look(name)
    except FastsaeError as error:
        raise ApiError(404, str(error), code="unknown_policy") from None
