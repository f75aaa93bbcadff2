"""Admin routes on vLLM's server: status, load, replace and delete policies; JSON only, own keys."""

import hmac
import json

from fastsae.errors import FastsaeError
from fastsae.steering.files import unique_keys
from fastsae.steering.vllm import settings as config
from fastsae.steering.vllm.ask import EngineGone, ask_engine

MAX_BODY_BYTES = 1 << 20


class Endpoints:
    """vLLM's EndpointPlugin. Keys come from the file in the setting admin_keys; without it, 403."""

    name = "fastsae"
    required_tasks = ("generate",)

    def __init__(self):
        self.keys: list[str] = []
        self.state = None

    def attach_router(self, app) -> None:
        from fastapi import APIRouter

        router = APIRouter(prefix="/fastsae")
        router.add_api_route("/status", self._route(self.status), methods=["GET"])
        router.add_api_route("/watched", self._route(self.watched), methods=["GET"])
        router.add_api_route("/policies", self._route(self.load), methods=["POST"])
        router.add_api_route("/policies", self._route(self.replace), methods=["PUT"])
        router.add_api_route("/policies/{policy}", self._route(self.delete), methods=["DELETE"])
        app.include_router(router)

    async def init_state(self, engine_client, state, args) -> None:
        settings = config.from_config(getattr(args, "additional_config", None))
        self.state = state
        self.keys = [] if settings is None else settings.read_admin_keys()

    def _route(self, function):
        from fastapi import Request
        from fastapi.responses import JSONResponse

        async def route(request: Request):
            if not self._allowed(request.headers.get("x-fastsae-key", "")):
                text = "send one of the server's admin keys in the header X-Fastsae-Key"
                return JSONResponse({"error": text}, 403)
            try:
                answer = await function(request)
            except FastsaeError as error:
                return JSONResponse({"error": str(error)}, 400)
            except EngineGone as gone:
                return JSONResponse({"error": str(gone)}, 503)
            return JSONResponse(answer, 400 if "error" in answer else 200)

        return route

    def _allowed(self, given: str) -> bool:
        sent = given.encode()
        return any(hmac.compare_digest(sent, key.encode()) for key in self.keys)

    async def status(self, request) -> dict:
        return await ask_engine(self.state, {"do": "status"})

    async def watched(self, request) -> dict:
        return await ask_engine(self.state, {"do": "watch"})

    async def load(self, request) -> dict:
        return await self._put(request, "load")

    async def replace(self, request) -> dict:
        return await self._put(request, "replace")

    async def delete(self, request) -> dict:
        asked = {"do": "delete", "policy": request.path_params["policy"]}
        self.state.fastsae_known = ({}, 0.0)
        return await ask_engine(self.state, asked)

    async def _put(self, request, do: str) -> dict:
        """Body: a policy as a file spells it, or {"policy": …, "holdout": 0.1, "watch": [7]}.

        ?site=1 for another SAE than the first.
        """
        site = request.query_params.get("site", "0")
        if not site.isdigit():
            raise FastsaeError(f"site: expected a number, got {site!r}")
        body = await request.body()
        if len(body) > MAX_BODY_BYTES:
            raise FastsaeError(f"body: at most {MAX_BODY_BYTES} bytes, got {len(body)}")
        try:
            policy = json.loads(body, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise FastsaeError(f"body: not JSON: {error}") from error
        fields = policy if isinstance(policy, dict) and "policy" in policy else {"policy": policy}
        for name in fields:
            if name not in ("policy", "holdout", "watch"):
                raise FastsaeError(
                    f"body: unknown key {name!r}; accepted are policy, holdout, watch"
                )
        self.state.fastsae_known = ({}, 0.0)
        return await ask_engine(self.state, {"do": do, "site": int(site), **fields})
