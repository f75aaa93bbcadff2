"""Many engines' answers as one; a start that would leave some of them behind."""

from types import SimpleNamespace

import pytest

import fastsae
from fastsae import Policy
from fastsae.steering.vllm.ask import agreed, merged
from fastsae.steering.vllm.install import refused
from fastsae.steering.vllm.requests import Footprint, Loaded, Registry

FOOTPRINT = Footprint(1, frozenset(), 1)


def status(*policies, in_use=(), held=0, armed=True, digest="a"):
    sites = [{"site": 0, "layer": 2, "digest": digest}]
    worker = {"rank": len(policies)}
    return {
        "armed": armed,
        "sites": sites,
        "policies": list(policies),
        "in_use": [dict(in_use)],
        "held": held,
        "workers": [worker],
    }


def listed(label, digest, *replaced):
    return {"policy": label, "digest": digest, "replaced": list(replaced)}


def test_a_status_is_of_all_engines():
    p = listed("p@1", "1")
    one = status(p, in_use={"1": 2}, held=1)
    two = status(p, listed("q@1", "5"), in_use={"1": 1, "5": 1}, held=3)
    found = merged("status", [one, two])
    assert found["armed"] and found["engines"] == 2 and len(found["workers"]) == 2
    assert found["in_use"] == [{"1": 3, "5": 1}] and found["held"] == 4
    assert found["policies"] == [p]
    assert not merged("status", [one, status(p, armed=False)])["armed"]
    assert not merged("status", [one, status(p, digest="b")])["armed"]
    assert merged("status", [one]) == one


def test_a_policy_on_its_way_is_what_every_engine_can_serve():
    new, old = listed("p@1", "new", "old"), listed("p@1", "old")
    assert agreed([[new], [old]]) == [old] == agreed([[old], [new]])
    assert agreed([[new], [new]]) == [new]
    # Two servers replaced it at once, and the engines heard of it in either order.
    a, b = listed("p@1", "a", "old", "b"), listed("p@1", "b", "old", "a")
    assert agreed([[a], [b]]) == [a] and agreed([[b], [a]]) == [b]
    assert agreed([[new], []]) == [] == agreed([[new], [listed("p@1", "unheard of")]])


def test_engines_tell_what_they_replaced():
    def loaded(strength):
        policy = Policy(fastsae.add(1, strength), name="p", version="1")
        return Loaded(0, policy, FOOTPRINT)

    registry, kinds = Registry(), [loaded(strength) for strength in (1.0, 2.0, 3.0)]
    for each in kinds:
        registry.add(each, replace=True)
    digests = [each.policy.digest for each in kinds]
    assert registry.replaced("p@1") == digests[:2]
    for digest in digests:
        assert registry.looked_up("p@1", digest).policy.digest == digest
    registry.remove("p@1")
    registry.add(kinds[0], replace=False)
    assert registry.replaced("p@1") == []


def counted(tokens, dose, act, features=("3",), opened=None, seconds=1.5):
    return {
        "policy": "p@1",
        "layer": 2,
        "tokens": tokens,
        "not_finite": 1,
        "gate": opened if opened is None else {"opened": opened, "closed": tokens - opened},
        "features": {name: {"sum": act, "max": act / 2} for name in features},
        "left_out": [],
        "dose": {"sum": dose, "max": dose / 2},
        "seconds": seconds,
    }


def test_what_engines_watch_is_added_up():
    one = {"watched": {"p@1": counted(4, 2.0, 6.0, opened=1), "q@1": counted(1, 1.0, 1.0)}}
    two = {"watched": {"p@1": counted(3, 8.0, 2.0, ("3", "17"), opened=3)}}
    found = merged("watch", [one, two])["watched"]
    assert found["q@1"] == one["watched"]["q@1"]
    p = found["p@1"]
    assert p["tokens"] == 7 and p["not_finite"] == 2 and p["seconds"] == 3.0 and p["layer"] == 2
    assert p["gate"] == {"opened": 4, "closed": 3} and p["dose"] == {"sum": 10.0, "max": 4.0}
    assert p["features"]["3"] == {"sum": 8.0, "max": 3.0}
    assert p["features"]["17"] == {"sum": 2.0, "max": 1.0}
    on_gpus = [{"watched": {"p@1": counted(1, 1.0, 1.0, seconds=None)}}] * 2
    assert merged("watch", on_gpus)["watched"]["p@1"]["seconds"] is None


def test_the_mistake_of_any_engine_is_the_answer():
    fine = {"policy": "p@1"}
    assert merged("load", [fine, fine]) == fine
    assert merged("load", [fine, {"error": "no room"}])["error"] == "engine 1 of 2: no room"
    assert merged("load", [{"error": "no room"}])["error"] == "no room"


@pytest.mark.parametrize(
    "parallel, reason",
    [
        ({"local_engines_only": True}, "--data-parallel-external-lb or -hybrid-lb"),
        ({"enable_elastic_ep": True}, "--enable-elastic-ep"),
    ],
)
def test_engines_that_an_admin_route_cannot_reach_stop_the_start(parallel, reason):
    asked = {"data_parallel_size": 2, "local_engines_only": False, "enable_elastic_ep": False}
    asked = SimpleNamespace(**asked | parallel)
    why = refused(asked, SimpleNamespace(admin_keys="keys.txt"))
    assert reason in why and "leave admin_keys out" in why
    assert refused(asked, SimpleNamespace(admin_keys=None)) is None
    asked.data_parallel_size = 1
    assert refused(asked, SimpleNamespace(admin_keys="keys.txt")) is None
