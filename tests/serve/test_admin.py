"""The operators' side of the server: policies that come and go, features, status, health."""

import asyncio
import json

import pytest

ASK = {"prompt": "Say: ", "max_tokens": 50}
SHOUT = {"steering": {"policy": "shout@1"}}
ADMIN = {"authorization": "Bearer root"}


def test_policies_are_replaced_while_requests_run(serving, engine, store, run):
    engine.beat = 0.01

    async def go():
        async with serving() as (client, _):
            first = asyncio.create_task(client.post("/v1/completions", json=ASK | SHOUT))
            await asyncio.sleep(0.03)
            operations = [{"op": "add", "features": [3], "strength": 1.0}]
            changed = {"name": "shout", "version": "1", "operations": operations}
            put = await client.put("/fastsae/policies", json=changed, headers=ADMIN)
            second = await client.post("/v1/completions", json=ASK | SHOUT)
            gone = await client.delete("/fastsae/policies/shout@1", headers=ADMIN)
            third = await client.post("/v1/completions", json=ASK | SHOUT)
            return await first, put, second, gone, third

    first, put, second, gone, third = run(go())
    assert first.status_code == second.status_code == 200
    assert put.json()["digest"] == second.json()["steering"]["digest"]
    assert first.json()["steering"]["digest"] != second.json()["steering"]["digest"]
    assert [job.decision.entry.policy.operations[0].features for job in engine.seen] == [
        (1, 2),
        (3,),
    ]
    assert gone.json() == {"deleted": "shout@1"} and third.status_code == 400


@pytest.mark.parametrize(
    "document, message",
    [
        ([], "expected a JSON object"),
        ({"name": "\ud800", "operations": [{"op": "ablate", "features": [1]}]}, "not JSON"),
        (
            {
                "policy": {"name": "x", "operations": [{"op": "ablate", "features": [1]}]},
                "layer": 12.0,
            },
            "layer: no SAE",
        ),
        ({"policy": {}, "code": "import os"}, "code: unknown key"),
        ({"policy": {"name": "x", "operations": []}}, "operations"),
        (
            {"name": "x", "operations": [{"op": "add", "features": [1], "strength": "a"}]},
            "strength",
        ),
        ({"operations": [{"op": "ablate", "features": [1]}]}, "name: missing"),
        ({"name": "x", "operations": [{"op": "ablate", "features": [100]}]}, "100 features"),
        (
            {
                "policy": {"name": "x", "operations": [{"op": "ablate", "features": [1]}]},
                "layer": 3,
            },
            "layer: no SAE",
        ),
        (
            {
                "policy": {"name": "x", "operations": [{"op": "ablate", "features": [1]}]},
                "holdout": 1,
            },
            "holdout",
        ),
        (
            {
                "policy": {
                    "name": "x",
                    "required": True,
                    "operations": [{"op": "ablate", "features": [1]}],
                },
                "holdout": 0.5,
            },
            "required",
        ),
    ],
)
def test_policies_that_are_refused(serving, store, run, document, message):
    before = store.all()

    async def go():
        async with serving() as (client, _):
            text = json.dumps(document)
            return await client.put("/fastsae/policies", content=text, headers=ADMIN)

    answer = run(go())
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]
    assert store.all() == before


def test_status_features_models_health(serving, run):
    class Found:
        def search(self, query, top):
            return [(7, 0.5)]

        def words(self, feature):
            return ["music"] * 20

    async def go():
        async with serving(explanations=Found()) as (client, app):
            found = await client.get("/fastsae/features?query=music", headers=ADMIN)
            bad = await client.get("/fastsae/features?query=music&top=0", headers=ADMIN)
            status = await client.get("/fastsae/status", headers=ADMIN)
            models = await client.get("/v1/models")
            ready = await client.get("/ready")
            app.state.server.engine.alive = False
            dead = [await client.get(route) for route in ("/health", "/ready")]
            nowhere = await client.get("/v1/nowhere")
            return found, bad, status, models, ready, dead, nowhere

    found, bad, status, models, ready, dead, nowhere = run(go())
    assert found.json()["features"] == [{"feature": 7, "score": 0.5, "words": ["music"] * 10}]
    assert bad.status_code == 400
    assert status.json()["policies"] == ["shout@1"] and status.json()["layers"] == [12]
    assert models.json()["data"][0]["id"] == "m"
    assert ready.status_code == 200 and [d.status_code for d in dead] == [503, 503]
    assert nowhere.status_code == 404 and "no such route" in nowhere.json()["error"]["message"]
