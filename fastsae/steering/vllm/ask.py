"""From a server's process to those of the engines, and many engines' answers as one."""

import asyncio
import json
from collections import Counter

from fastsae.steering.vllm.settings import KEY

LOOK_SECONDS = 0.5


class EngineGone(Exception):
    """There is no engine, or it died before it answered."""


async def ask_engine(state, asked: dict) -> dict:
    """A command to every engine's process through vLLM's own collective_rpc; what they answer.

    An engine that dies leaves such a call open for ever, so its death is looked for meanwhile.
    """
    client = getattr(state, "engine_client", None)
    if client is None:
        raise EngineGone("there is no engine")
    call = asyncio.ensure_future(_ask_all(client, json.dumps(asked)))
    try:
        while not call.done():
            await asyncio.wait([call], timeout=LOOK_SECONDS)
            if not call.done() and client.errored:
                raise EngineGone("the engine has died")
        answers = call.result()
    except Exception as error:
        if client.errored:
            raise EngineGone("the engine has died") from error
        raise
    finally:
        call.cancel()
    return merged(asked["do"], [json.loads(answer) for answer in answers])


async def _ask_all(client, text: str) -> list[str]:
    """With data parallelism vLLM's collective_rpc gives the first engine's answer alone."""
    every = getattr(getattr(client, "engine_core", None), "call_utility_all_async", None)
    if every is None:  # vLLM has one engine only: see install.refused
        return await client.collective_rpc(KEY, args=(text,))
    return [answer for (answer,) in await every("collective_rpc", KEY, None, (text,), None)]


def merged(do: str, answers: list[dict]) -> dict:
    """One answer of engines in the order of their ranks; a mistake of any is the answer."""
    for rank, answer in enumerate(answers):
        if "error" in answer:
            where = f"engine {rank} of {len(answers)}: " if len(answers) > 1 else ""
            return {"error": where + answer["error"]}
    first = answers[0]
    if len(answers) == 1 or do not in ("status", "watch"):
        return first
    if do == "watch":
        labels = dict.fromkeys(label for answer in answers for label in answer["watched"])
        each = {l: [a["watched"][l] for a in answers if l in a["watched"]] for l in labels}
        return {"watched": {label: added(numbers) for label, numbers in each.items()}}
    in_use = [Counter() for _ in first["in_use"]]
    for answer in answers:
        for total, used in zip(in_use, answer["in_use"], strict=True):
            total.update(used)
    return {
        "armed": all(a["armed"] and a["sites"] == first["sites"] for a in answers),
        "engines": len(answers),
        "sites": first["sites"],
        "policies": agreed([answer["policies"] for answer in answers]),
        "in_use": [dict(used) for used in in_use],
        "held": sum(answer["held"] for answer in answers),
        "workers": [worker for answer in answers for worker in answer["workers"]],
    }


def agreed(listed: list[list[dict]]) -> list[dict]:
    """The policies that every engine can serve now, as one of them has them, by label.

    While a replacement is on its way, that is the policy it takes the place of: engines that have
    replaced it still know it.
    """
    by_engine = [{each["policy"]: each for each in policies} for policies in listed]

    def known(each: dict, policies: dict) -> bool:
        mine = policies.get(each["policy"])
        return mine is not None and each["digest"] in (mine["digest"], *mine["replaced"])

    found = []
    for label in by_engine[0]:
        candidates = [policies[label] for policies in by_engine if label in policies]
        served = [c for c in candidates if all(known(c, policies) for policies in by_engine)]
        found += served[:1]
    return found


def added(numbers: list[dict]) -> dict:
    """What several engines counted of one policy."""

    def total(*path: str):
        found = []
        for each in numbers:
            for name in path:
                each = each[name]
            found.append(each)
        return sum(found)

    def sums(of: list[dict]) -> dict:
        return {"sum": sum(each["sum"] for each in of), "max": max(each["max"] for each in of)}

    first = numbers[0]
    features = {name for each in numbers for name in each["features"]}
    return first | {
        "tokens": total("tokens"),
        "not_finite": total("not_finite"),
        "gate": first["gate"] and {side: total("gate", side) for side in first["gate"]},
        "features": {
            name: sums([e["features"][name] for e in numbers if name in e["features"]])
            for name in sorted(features, key=int)
        },
        "dose": sums([each["dose"] for each in numbers]),
        "seconds": None if first["seconds"] is None else total("seconds"),
    }
