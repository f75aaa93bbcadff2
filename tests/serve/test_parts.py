"""The parts of the server that need neither HTTP nor a model."""

import json
import math

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.serve.audit import Audit
from fastsae.serve.policies import Entry, PolicyStore
from fastsae.serve.sampling import HEAD, Sampling, draw
from fastsae.serve.text import TextStream
from fastsae.steering import Policy, ablate, control
from fastsae.steering.control import LatencyGuard, decide, in_holdout


def entry(name="p", version="1", **more):
    policy = Policy([ablate([1])], name=name, version=version, required=more.pop("required", False))
    return Entry(policy, 12, **more)


# --- text ---------------------------------------------------------------------------------------


class Bytes:
    """A token is a byte of UTF-8; incomplete characters decode to U+FFFD, as in real tokenizers."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["naïve café", "日本語", "🙂🙃", "plain"])
@pytest.mark.parametrize("stops", [(), ("zzz",), ("never", "é!")])
def test_text_comes_whole_character_by_character(text, stops):
    stream = TextStream(Bytes(), list(b"before"), stops)
    given = [stream.feed(byte) for byte in text.encode()]
    assert "".join(given) + stream.finish() == text == stream.text
    assert all("\ufffd" not in part for part in given)


def test_half_a_character_at_the_end_is_still_given():
    stream = TextStream(Bytes(), [], ())
    given = "".join(stream.feed(byte) for byte in "aé".encode()[:-1])
    assert given + stream.finish() == "a\ufffd"


@pytest.mark.parametrize("stops, text", [(["cd"], "ab"), (["bcx", "de"], "abc"), (["f", "a"], "")])
def test_stops_across_tokens(stops, text):
    stream = TextStream(Bytes(), [], stops)
    given = "".join(stream.feed(byte) for byte in b"abcdef") + stream.finish()
    assert (given, stream.text, stream.stopped) == (text, text, True)


def test_what_was_held_for_a_stop_that_never_came_is_given():
    stream = TextStream(Bytes(), [], ["abcd"])
    assert [stream.feed(byte) for byte in b"xabc"] == ["x", "", "", ""]
    assert stream.finish() == "abc" and not stream.stopped and stream.text == "xabc"


# --- sampling -----------------------------------------------------------------------------------


def test_greedy_is_the_largest_logit():
    logits = torch.randn(1000)
    assert draw(logits, Sampling(0.0), 5) == int(logits.argmax())


@pytest.mark.parametrize(
    "how",
    [Sampling(), Sampling(0.5), Sampling(2.0, top_k=3), Sampling(1.0, 0.6), Sampling(1.0, 0.9, 4)],
)
def test_draws_follow_the_distribution(how):
    """Against generate's own warpers, in the order of generate, on 4000 draws."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.0, -1.0, -math.inf])
    scores = TemperatureLogitsWarper(how.temperature)(None, logits[None])
    scores = TopKLogitsWarper(how.top_k)(None, scores) if how.top_k else scores
    scores = TopPLogitsWarper(how.top_p)(None, scores) if how.top_p < 1 else scores
    wanted = scores.softmax(-1)[0]
    drawn = torch.tensor([draw(logits, how, step) for step in range(4000)])
    share = torch.bincount(drawn, minlength=7) / 4000
    assert (share - wanted).abs().max() < 0.03
    assert not share[wanted == 0].any()


@pytest.mark.parametrize("top_p", [0.5, 0.999])
def test_a_nucleus_wider_than_the_head(top_p):
    """A flat distribution: the nucleus holds more tokens than are sorted at first."""
    logits = torch.zeros(4 * HEAD)
    drawn = {draw(logits, Sampling(1.0, top_p), step) for step in range(300)}
    assert len(drawn) > 200


def test_numbers_depend_on_seed_and_step_alone():
    logits = torch.randn(5000)
    tokens = [draw(logits, Sampling(seed=3), step) for step in range(50)]
    assert tokens == [draw(logits, Sampling(seed=3), step) for step in range(50)]
    assert tokens != [draw(logits, Sampling(seed=4), step) for step in range(50)]
    assert len(set(tokens)) > 30
    assert draw(logits, Sampling(seed=-(2**62)), 0) >= 0


# --- control ------------------------------------------------------------------------------------


def test_a_share_of_users_is_held_out_and_stays_so():
    held = [in_holdout(entry(holdout=0.25), f"user{i}") for i in range(4000)]
    assert 0.22 < sum(held) / 4000 < 0.28
    assert held == [in_holdout(entry(version="2", holdout=0.25), f"user{i}") for i in range(4000)]
    other = [in_holdout(entry("q", holdout=0.25), f"user{i}") for i in range(4000)]
    assert other != held


def test_the_guard_opens_above_its_budget_and_closes_again(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(control.time, "monotonic", lambda: clock[0])
    guard = LatencyGuard(50.0, window=10)
    for _ in range(19):
        guard.token(500.0)
    assert not guard.exceeded()  # too few to say
    guard.token(500.0)
    assert guard.exceeded()
    clock[0] = 11.0
    assert not guard.exceeded()
    for _ in range(100):
        guard.token(10.0)
    guard.token(500.0)
    assert not guard.exceeded()
    assert not LatencyGuard(None).exceeded()


def test_only_optional_policies_are_dropped_for_latency():
    guard = LatencyGuard(1.0)
    for _ in range(30):
        guard.token(5.0)
    assert decide(entry(), 1.0, "k", guard).reason == "latency"
    kept = decide(entry(required=True), 1.0, "k", guard)
    assert kept.steered and kept.reason == "steered"
    assert decide(entry(), 0.0, "k", LatencyGuard(None)).reason == "strength 0"
    assert decide(None, 1.0, "k", guard).reason == "none"
    assert not decide(entry(holdout=0.9999), 1.0, "k", LatencyGuard(None)).steered


# --- policies -----------------------------------------------------------------------------------


def test_names_versions_and_files(tmp_path):
    store = PolicyStore((12, "blocks.3.hook_resid_pre"), lambda entry: None)
    ones = [
        {"name": "a", "version": str(v), "operations": [{"op": "ablate", "features": [v]}]}
        for v in (1, 2)
    ]
    (tmp_path / "two.json").write_text(json.dumps(ones))
    with pytest.raises(FastsaeError, match="layer: missing, and SAEs are attached at 12, blocks"):
        store.load(tmp_path)
    assert [e.id for e in store.load(tmp_path, 12)] == ["a@1", "a@2"]
    assert store.get("a").id == "a@2" and store.get("a@1").id == "a@1"
    store.put({"policy": ones[0], "layer": 12})
    assert store.get("a").id == "a@1"  # the latest admitted
    with pytest.raises(FastsaeError, match=r"policy: 'a@3' is unknown; known are a@2, a@1"):
        store.get("a@3")
    assert store.delete("a@2").id == "a@2"
    with pytest.raises(FastsaeError, match="delete by full id"):
        store.delete("a")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(FastsaeError, match=r"bad\.json"):
        store.load(tmp_path, 12)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FastsaeError, match="holds no policy file"):
        store.load(empty, 12)


@pytest.mark.parametrize("watch", [5, "12", [1.5], [-1], [True], None])
def test_what_to_watch_is_a_list_of_features(watch):
    with pytest.raises(FastsaeError, match="watch: expected a list of features"):
        entry(watch=watch)


# --- the audit ----------------------------------------------------------------------------------


def lines(path):
    return [json.loads(line)["n"] for line in path.read_text().splitlines()]


def test_an_audit_file_that_is_moved_or_deleted_is_opened_anew(tmp_path):
    path = tmp_path / "audit.jsonl"
    audit = Audit(path)
    audit.record(n=1)
    path.rename(tmp_path / "old")
    audit.record(n=2)
    path.unlink()
    audit.record(n=3)
    audit.record(n=4)
    audit.close()
    audit.record(n=5)
    assert lines(tmp_path / "old") == [1] and lines(path) == [3, 4] and audit.lost == 0


def test_a_full_disk_is_one_warning_and_a_count(logged):
    audit = Audit("/dev/full")
    for n in range(3):
        audit.record(n=n)
    assert audit.lost == 3
    (warning,) = logged
    assert "audit: cannot write /dev/full: [Errno 28]" in warning


def test_a_folder_that_comes_back_is_written_again(tmp_path, logged):
    path = tmp_path / "logs" / "audit.jsonl"
    path.parent.mkdir()
    audit = Audit(path)
    path.unlink()
    path.parent.rmdir()
    audit.record(n=1)
    audit.record(n=2)
    path.parent.mkdir()
    audit.record(n=3)
    assert lines(path) == [3] and audit.lost == 2 and len(logged) == 1


def test_a_line_that_was_cut_does_not_spoil_the_next(tmp_path, logged):
    class Short:
        def __init__(self, file):
            self.file, self.room = file, 5

        def write(self, text):
            room, self.room = self.room, 10**6
            return self.file.write(text[:room])

        def __getattr__(self, name):
            return getattr(self.file, name)

    audit = Audit(tmp_path / "audit.jsonl")
    audit._file = Short(audit._file)
    audit.record(n=1)
    audit.record(n=2)
    cut, whole = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert len(cut) == 5 and json.loads(whole)["n"] == 2 and audit.lost == 1
    assert "only 5 of" in logged[0]
