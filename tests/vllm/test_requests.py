"""The steering field, policies by name, what is in use, whose cache is whose, and the settings."""

import json
from types import SimpleNamespace

import pytest

import fastsae
from fastsae import FastsaeError, Policy
from fastsae.steering.table import Capacity
from fastsae.steering.vllm.engine import Gate
from fastsae.steering.vllm.install import problem
from fastsae.steering.vllm.requests import (
    Footprint,
    Ledger,
    Loaded,
    Registry,
    Wish,
    cache_salt,
)
from fastsae.steering.vllm.settings import Settings, SiteSettings, from_config, layer_after


def loaded(name, version=None, feature=1, site=0):
    policy = Policy(fastsae.ablate(feature), name=name, version=version)
    return Loaded(site, policy, Footprint(1, frozenset({(feature, False)}), 1))


def test_a_wish_is_read_from_json_and_from_a_dictionary():
    assert Wish.of('{"policy": "a", "strength": 2}', 10) == Wish("a", 2.0)
    assert Wish.of({"policy": "a"}, 10) == Wish("a", 1.0)
    assert Wish.of(Wish("a", 2.0).to_json(), 10) == Wish("a", 2.0)
    told = Wish("a", 2.0, "ab12")
    assert Wish.of(told.to_json(), 10, found=True) == told
    with pytest.raises(FastsaeError, match="unknown key 'digest'"):
        Wish.of(told.to_json(), 10)


@pytest.mark.parametrize(
    "given, says",
    [
        ("{", "not JSON"),
        ([], "expected an object"),
        ({"policy": ""}, "steering.policy"),
        ({"policy": "a", "x": 1}, "unknown key 'x'"),
        ({"policy": "a", "strength": True}, "steering.strength"),
        ({"policy": "a", "strength": float("nan")}, "steering.strength"),
        ({"policy": "a", "strength": -11}, "±10"),
        ({"policy": {}, "site": 0}, "unknown key 'site'"),  # what the engine sends to workers
    ],
)
def test_a_wrong_wish_says_what_is_wrong(given, says):
    with pytest.raises(FastsaeError, match=says):
        Wish.of(given, 10)


def test_a_name_alone_is_the_version_loaded_last():
    registry = Registry()
    one, two = loaded("a", "1"), loaded("a", "2", feature=2)
    registry.add(one, replace=False)
    registry.add(two, replace=False)
    assert registry.find("a") == two and registry.find("a@1") == one
    assert registry.remove("a@2") == two and registry.find("a") == one
    registry.remove("a")
    with pytest.raises(FastsaeError, match="no policy 'a'; loaded are none"):
        registry.find("a")


def test_a_policy_that_leaves_is_there_for_requests_that_were_told_of_it():
    registry = Registry(kept=2)
    old, new = loaded("a"), loaded("a", feature=2)
    registry.add(old, replace=False)
    registry.add(new, replace=True)
    assert registry.looked_up("a", old.policy.digest) == old
    assert registry.looked_up("a", new.policy.digest) == registry.looked_up("a", None) == new
    registry.remove("a")
    assert registry.looked_up("a", new.policy.digest) == new and registry.listed() == []
    with pytest.raises(FastsaeError, match="no policy 'a'"):
        registry.looked_up("a", None)
    registry.add(loaded("b"), replace=False)
    registry.remove("b")  # the third to leave
    with pytest.raises(FastsaeError, match="'a' was deleted or replaced; ask again"):
        registry.looked_up("a", old.policy.digest)


def test_other_content_under_the_same_label_must_be_a_replacement():
    registry = Registry()
    registry.add(loaded("a"), replace=False)
    registry.add(loaded("a"), replace=False)  # the same again
    with pytest.raises(FastsaeError, match="replace it"):
        registry.add(loaded("a", feature=2), replace=False)
    registry.add(loaded("a", feature=2), replace=True)
    assert registry.find("a") == loaded("a", feature=2)
    with pytest.raises(FastsaeError, match="another site"):
        registry.add(loaded("a", "3", site=1), replace=False)
    with pytest.raises(FastsaeError, match="needs one"):
        registry.add(loaded(None), replace=False)


def test_a_ledger_counts_users_and_shares_rows():
    ledger = Ledger(max_policies=2, max_features=3, max_items=4)
    a, b = Footprint(1, frozenset({1, 2}), 2), Footprint(1, frozenset({2, 3}), 2)
    assert ledger.acquire("a", a) and ledger.acquire("b", b) and ledger.acquire("a", a)
    assert not ledger.acquire("c", Footprint(1, frozenset({1}), 0))
    assert ledger.in_use == {"a": 2, "b": 1}
    ledger.release("a")
    ledger.release("a")
    assert not ledger.acquire("c", Footprint(1, frozenset({4, 5}), 1))
    assert not ledger.acquire("c", Footprint(1, frozenset({4}), 3))
    assert ledger.acquire("c", Footprint(1, frozenset({4}), 2))


def test_a_cache_salt_tells_apart_everything_that_changes_blocks():
    p, q = loaded("a").policy, loaded("a", feature=2).policy
    different = [
        (None, "s", p, 1.0),
        ("x", "s", p, 1.0),
        (None, "t", p, 1.0),
        (None, "s", q, 1.0),
        (None, "s", p, 0.5),
        (None, "s", Policy(fastsae.ablate(1), name="a", phase="generated"), 1.0),
    ]
    salts = {cache_salt(*each) for each in different}
    assert len(salts) == len(different)
    assert all(len(salt) == 64 and set(salt) <= set("0123456789abcdef") for salt in salts)
    assert cache_salt(*different[0]) in salts


class Scheduler:
    """As much of vLLM's as the gate touches."""

    def __init__(self):
        self.requests, self.order, self.steps = {}, [], 0

    def add_request(self, request):
        self.requests[request.request_id] = request
        self.order.append(request.request_id)

    def _free_request(self, request):
        del self.requests[request.request_id]

    def finish_requests(self, names, status):
        gone = [self.requests[n] for n in names or list(self.requests) if n in self.requests]
        for request in gone:
            self._free_request(request)
        return gone

    def schedule(self):
        self.steps += 1

    def get_num_unfinished_requests(self):
        return len(self.requests)


@pytest.fixture
def scheduler():
    scheduler = Scheduler()
    settings = Settings((SiteSettings("x", None, 1, None),), Capacity(2), 0, False, 1.0, None, None)
    scheduler.gate = Gate(scheduler, settings)
    return scheduler


def request(name, policy=None):
    return SimpleNamespace(request_id=name, fastsae=policy and loaded(policy, feature=ord(policy)))


def test_requests_wait_in_their_turn_when_the_table_is_full(scheduler):
    for name, policy in ("1a", "2b", "3-", "4c", "5a", "6d"):
        scheduler.add_request(request(name, None if policy == "-" else policy))
    assert scheduler.order == ["1", "2", "3"]
    assert list(scheduler.gate.held) == ["4", "5", "6"]  # 5 would fit, but came after 4
    scheduler.schedule()
    assert len(scheduler.gate.held) == 3
    scheduler.finish_requests("1", "done")
    scheduler.schedule()
    assert scheduler.order == ["1", "2", "3", "4"]
    scheduler.finish_requests(["2"], "done")
    scheduler.schedule()
    assert scheduler.order[4:] == ["5"] and list(scheduler.gate.held) == ["6"]
    scheduler.finish_requests(["4"], "done")
    scheduler.schedule()
    scheduler.finish_requests(["3", "5", "6"], "done")
    assert not scheduler.gate.held and not scheduler.gate.admitted and not scheduler.requests
    assert [ledger.in_use for ledger in scheduler.gate.ledgers] == [{}]


def test_a_request_that_waits_can_be_aborted(scheduler):
    for name, policy in ("1a", "2b", "3c", "4d"):
        scheduler.add_request(request(name, policy))
    (gone,) = scheduler.finish_requests(["3"], "aborted")
    assert gone.request_id == "3" and gone.status == "aborted"
    assert len(scheduler.finish_requests(None, "aborted")) == 3
    assert [ledger.in_use for ledger in scheduler.gate.ledgers] == [{}]


def test_settings_are_read_and_unknown_keys_refused():
    site = {"sae": "folder", "layer": 2}
    read = from_config({"fastsae": {"sites": [site], "max_policies": 3}})
    assert read.sites[0].layer == 2 and read.capacity.max_policies == 3 and not read.first_token
    assert from_config({}) is None and from_config(None) is None
    for wrong, says in (
        ({}, "sites"),
        ({"sites": [site], "x": 1}, "unknown key 'x'"),
        ({"sites": [{"layer": 1}]}, r"sites\[0\].sae: missing"),
        ({"sites": [site | {"layer": "attn"}]}, "hook"),
        ({"sites": [site], "membership": -1}, "membership"),
        ({"sites": [site], "first_token": 1}, "first_token"),
        ({"sites": [site], "max_policies": 0}, "max_policies"),
        ({"sites": [site], "max_strength": 0}, "max_strength"),
        ({"sites": [site], "latency_budget_ms": 0}, "latency_budget_ms"),
        ({"sites": [site], "watch": -1}, "watch"),
        ({"sites": [site | {"dose": {"limit": 0}}]}, r"sites\[0\].dose.limit: "),
        ({"sites": [site | {"dose": {"limit": 1, "action": "stop"}}]}, "dose.action: expected"),
        ({"sites": [site | {"dose": {"limit": 1, "action": "refuse"}}]}, '"refuse" must fail'),
        ({"sites": [site | {"dose": {"limit": 1}}], "watch": 0}, '"warn" needs watching'),
        ({"sites": [site | {"holdout": 0.5}]}, r"sites\[0\].holdout: expected"),
        ({"sites": [site | {"holdout": {"a": 1}}]}, r"holdout\['a'\]: .*share in \[0, 1\)"),
    ):
        with pytest.raises(FastsaeError, match=says):
            from_config({"fastsae": wrong})


def test_hold_outs_belong_to_policies_of_the_file(tmp_path):
    file = tmp_path / "policies.json"
    policies = [loaded("a", "1").policy.to_dict(), loaded("b").policy.to_dict()]
    file.write_text(json.dumps(policies))
    site = {"sae": "folder", "policies": str(file), "holdout": {"a@1": 0.25}}
    (read,) = from_config({"fastsae": {"sites": [site]}}).sites
    assert [(policy.label, share) for policy, share in read.read_policies()] == [
        ("a@1", 0.25),
        ("b", 0.0),
    ]
    with pytest.raises(FastsaeError, match="no policy 'a' in the policies file; it has a@1, b"):
        read._replace(holdout={"a": 0.25}).read_policies()


def test_admin_keys_come_from_a_file(tmp_path):
    (tmp_path / "keys").write_text("one\n\n two \n")
    settings = Settings((), Capacity(), 0, False, 1.0, str(tmp_path / "keys"), None)
    assert settings.read_admin_keys() == ["one", "two"]
    with pytest.raises(FastsaeError, match="admin_keys"):
        settings._replace(admin_keys=str(tmp_path / "none")).read_admin_keys()
    assert settings._replace(admin_keys=None).read_admin_keys() == []


@pytest.mark.parametrize(
    "layer, trained, after",
    [
        (None, "blocks.3.hook_resid_post", 3),
        (None, "blocks.3.hook_resid_pre", 2),
        (3, "blocks.3.hook_resid_pre", 2),
        (4, "blocks.3.hook_resid_pre", 4),
        ("layers.5.input", None, 4),
        (5, None, 5),
    ],
)
def test_a_site_is_the_output_of_a_layer(layer, trained, after):
    assert layer_after(SiteSettings("x", None, layer, None), trained) == after


def test_a_site_nobody_can_place_is_an_error():
    with pytest.raises(FastsaeError, match="does not say where"):
        layer_after(SiteSettings("x", None, None, None), None)
    with pytest.raises(FastsaeError, match="embedding"):
        layer_after(SiteSettings("x", None, "layers.0.input", None), None)


def test_a_version_or_a_surface_that_is_not_the_tested_one_is_named():
    assert "this is 0.31.9" in problem("0.31.9", ())
    assert "this is 0.34.0rc1" in problem("0.34.0rc1", ())
    assert problem("0.33.1", ()) is None
    nowhere = ("fastsae.steering.nowhere", "", "f", ())
    assert "no fastsae.steering.nowhere" in problem("0.32.0", (nowhere,))
    gone = ("fastsae.steering.policy", "Policy", "vanished", ())
    assert "Policy.vanished" in problem("0.32.0", (gone,))
    other = ("fastsae.steering.policy", "Policy", "from_file", ("path", "mode"))
    assert "takes no mode" in problem("0.32.0", (other,))
