"""From the server's process to the engine's."""

import asyncio
import json

from fastsae.steering.vllm.settings import KEY

LOOK_SECONDS = 0.5


class EngineGone(Exception):
    """There is no engine, or it died before it answered."""


async def ask_engine(state, asked: dict) -> dict:
    """A command to the engine's process through vLLM's own collective_rpc; its answer.

    An engine that dies leaves such a call open for ever, so its death is looked for meanwhile.
    """
    client = getattr(state, "engine_client", None)
    if client is None:
        raise EngineGone("there is no engine")
    call = asyncio.ensure_future(client.collective_rpc(KEY, args=(json.dumps(asked),)))
    try:
        while not call.done():
            await asyncio.wait([call], timeout=LOOK_SECONDS)
            if not call.done() and client.errored:
                raise EngineGone("the engine has died")
        (answer,) = call.result()
    except Exception as error:
        if client.errored:
            raise EngineGone("the engine has died") from error
        raise
    finally:
        call.cancel()
    return json.loads(answer)
