"""Copies of weights that screens keep on a GPU, in Triton's interpreter: weights edited unseen,
copies that went wrong, graphs that read copies. No result may ever show them.

Triton reads TRITON_INTERPRET when it is imported. Without it this file has one test, which runs
the file again in a process that has it. A replay of a graph is a call that reads the captured copy.
"""

import os
from types import SimpleNamespace

import pytest
import torch

from fastsae.ops import screens

pytest.importorskip("triton")
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETING:
    from fastsae.kernels import candidates, copies, encode, encode_threshold, rescore, screen


def test_in_the_interpreter(run_again):
    run_again(__file__)


N, D, F, K = 3, 72, 200, 6


@pytest.fixture(autouse=INTERPRETING)
def small(monkeypatch):
    monkeypatch.setattr(copies, "SMALLEST", 0)
    copies.clear()
    copies._captured.clear()
    yield
    copies.clear()
    copies._captured.clear()


@pytest.fixture(params=["int8", "step", "fused", "cublas"])
def product(request, monkeypatch):
    monkeypatch.setattr(candidates, "CHOICES", ((99, 9999, request.param),))
    return request.param


class Problem:
    def __init__(self, seed=0, weights=torch.float32):
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(N, D, generator=draw)
        self.W = (torch.randn(F, D, generator=draw) / D**0.5).to(weights)
        self.b = torch.randn(F, generator=draw) / 10

    def codes(self, W=None):
        return encode.encode_topk(self.x, self.W if W is None else W, self.b, K)

    def fresh(self):
        """What weights that nothing is kept of give."""
        return self.codes(self.W.clone())

    def kept(self, kind=None):
        """The tensors of the kept copy, made by two calls."""
        self.codes(), self.codes()
        (weights,) = [w for w in copies._seen.values() if w.copies]
        return screen.Weights(*next(iter(weights.copies.values())).tensors, kind, True)


def same(got, wanted):
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_an_edit_makes_the_copy_anew_in_place(product):
    p = Problem()
    w = p.kept()
    place, before = w.copy.data_ptr(), w.copy.clone()
    p.W.data.mul_(-0.7)
    assert same(p.codes(), p.fresh())
    assert w.copy.data_ptr() == place and not torch.equal(w.copy, before)
    kind = "int8" if product == "int8" else "bf16"
    made = screen.Weights(*screen._make(p.W, kind, p.x, None), kind, False)
    assert torch.equal(w.copy, made.copy) and torch.equal(w.norms, made.norms)
    assert torch.equal(w.digests, made.digests) and w.stale.item() == 0
    assert same(p.codes(), p.fresh())


def test_bf16_weights_keep_norms_alone():
    p = Problem(weights=torch.bfloat16)
    w = p.kept()
    assert w.copy.numel() == 0
    p.W.data[11] *= 3
    norms = w.norms.clone()
    assert same(p.codes(), p.fresh())
    changed = (w.norms != norms).nonzero().flatten()
    assert changed.tolist() == [11]


def test_every_column_is_in_the_digest_of_some_row():
    """Also those that do not fill a line: 72 columns are four lines of 16 and half a line."""
    p = Problem()
    w = p.kept()
    for column in (0, 15, 16, 63, 64, 71):
        p.W.data[:, column] += 2
        digests = w.digests.clone()
        assert same(p.codes(), p.fresh()), column
        assert ((w.digests != digests)[:F]).sum() == F // 5, column


def line_of(feature):
    """The columns of a feature that its digest sees."""
    first = feature % -(-D // 16) * 16
    return range(first, min(first + 16, D))


def test_a_value_outside_its_bound_sends_every_row_the_whole_way(product, monkeypatch):
    """A single weight that no digest sees: the feature is a member of one row, by the old copy."""
    p = Problem()
    w = p.kept()
    feature = int(p.codes()[1][0, 0])
    column = next(c for c in range(D) if c not in line_of(feature))
    p.W.data[feature, column] += 3
    whole = []
    full_rows = rescore.full_rows

    def watched(*arguments):
        for rows, h in full_rows(*arguments):
            whole.extend(rows.tolist())
            yield rows, h

    monkeypatch.setattr(rescore, "full_rows", watched)
    assert same(p.codes(), p.fresh())
    assert whole[:N] == list(range(N)) and whole[N:] == [-1] * N, "fresh weights are screened"
    assert w.stale.item() == 1
    before = w.copy.clone()
    assert same(p.codes(), p.fresh()) and whole[2 * N :] == [-1] * 2 * N
    assert w.stale.item() == 0 and not torch.equal(w.copy, before), "made anew by the next call"


@pytest.mark.parametrize("two_steps", [False, True])
def test_a_corrupt_copy_never_shows(product, two_steps, monkeypatch):
    """The rows of the copy are those of other features, the digests are right: members are missing
    among the candidates, and those that are there contradict their bounds."""
    monkeypatch.setattr(rescore, "TWO_STEPS", 0 if two_steps else 99)
    p = Problem()
    w = p.kept()
    fresh = p.fresh()
    order = torch.randperm(F, generator=torch.Generator().manual_seed(1))
    w.copy.copy_(w.copy[order])
    if w.scales.numel():
        w.scales.copy_(w.scales[order])
    threshold = torch.full((F,), 1.0)
    arguments = (p.W.clone(), p.b, threshold, 40)
    padded = encode_threshold.encode_threshold_padded(p.x, *arguments)
    got = encode_threshold.encode_threshold_padded(p.x, p.W, *arguments[1:])
    assert same(got, padded) and w.stale.item() == 1
    w.stale.zero_()  # forget it, as if nobody had noticed yet
    assert same(p.codes(), fresh)
    w.stale.zero_()
    with monkeypatch.context() as patch:  # what would come out if nobody looked
        look = rescore.rescore
        patch.setattr(rescore, "rescore", lambda *a: (look(*a)[0], torch.zeros(1).int()))
        assert not same(p.codes(), fresh)


def test_values_without_a_bound_are_no_evidence():
    p = Problem()
    p.W[3], p.W[4], p.x[0, 2], p.b[7] = torch.nan, torch.inf, torch.inf, torch.nan
    w = p.kept()
    for _ in range(2):
        p.codes()
        assert w.stale.item() == 0


class Graph:
    """A captured call: its replays read the copy that was kept then, whatever happens to it."""

    def __init__(self, p, monkeypatch):
        self.p, self.patch = p, monkeypatch
        with monkeypatch.context() as patch:
            patch.setattr(copies, "capturing", lambda device: True)
            p.codes()
        self.tensors = copies._captured[-1].tensors

    def replay(self):
        with self.patch.context() as patch:
            patch.setattr(copies, "of", lambda *arguments: (self.tensors, True))
            return self.p.codes()


EDITS = {
    "all": lambda W: W.data.mul_(-1.5),
    "a row": lambda W: W.data[17].mul_(9),
    "a column": lambda W: W.data[:, 40].sub_(4),
    "seen by torch": lambda W: W.mul_(-0.5),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_a_replay_follows_the_weights(edit, monkeypatch):
    p = Problem()
    p.kept()
    graph = Graph(p, monkeypatch)
    assert same(graph.replay(), p.fresh())
    edit(p.W)
    assert same(graph.replay(), p.fresh())
    stale = graph.tensors[-1]
    assert stale.item() == 0 and same(graph.replay(), p.fresh())


def hidden(p):
    """Makes a feature that no row has the first of all by one weight that its digest skips."""
    feature = min(set(range(F)) - set(p.codes()[1].flatten().tolist()))
    column = next(c for c in range(D) if c not in line_of(feature) and p.x[0, c] > 0.5)
    return feature, column


@pytest.mark.parametrize("call", ["the next call", "clear"])
def test_single_weights_reach_a_graph_after_a_call_outside(call, monkeypatch):
    p = Problem()
    p.kept()
    graph = Graph(p, monkeypatch)
    feature, column = hidden(p)
    if call == "clear":
        p.W.data[feature, column] = 50.0
        screens.clear()
    else:
        p.W[feature, column] = 50.0
        p.codes()
    got = graph.replay()
    assert got[1][0, 0] == feature and same(got, p.fresh())
    assert graph.tensors[-1].item() == 0
    p.codes()
    assert graph.tensors[-1].item() == 0, "marked once for one edit"


def test_copies_made_in_inference_mode_reach_a_graph(monkeypatch):
    p = Problem()
    with torch.inference_mode():
        p.kept()
        graph = Graph(p, monkeypatch)
    feature, column = hidden(p)
    p.W[feature, column] = 50.0
    p.codes()
    assert same(graph.replay(), p.fresh()) and graph.replay()[1][0, 0] == feature
    screens.clear()
    assert graph.tensors[-1].item() == 1


@pytest.mark.parametrize("before", [1, 2, 3])
def test_a_captured_call_launches_what_the_first_call_did(before, product, monkeypatch):
    """Kernels are loaded when they are first launched, and that fails while a graph is captured."""
    launched = set()

    class Recorded:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            def launch(*arguments, **flags):
                launched.add((self.name, *sorted(flags.items())))
                return self.kernel[grid](*arguments, **flags)

            return launch

    for name in ("_changed_kernel", "_copy_kernel", "_features_kernel", "_rows_kernel"):
        monkeypatch.setattr(screen, name, Recorded(getattr(screen, name), name))
    p = Problem()
    for _ in range(before):
        p.codes()
    loaded = set(launched)
    monkeypatch.setattr(copies, "capturing", lambda device: True)
    p.codes()
    assert loaded and launched == loaded


def test_what_is_made_under_capture_is_not_kept(monkeypatch):
    p = Problem()
    with monkeypatch.context() as patch:
        patch.setattr(copies, "capturing", lambda device: True)
        for _ in range(3):
            assert same(p.codes(), p.fresh())
    assert copies.total_bytes() == 0


def test_what_a_pool_owns_is_not_kept(monkeypatch):
    """torch.compile warms its graphs up outside of a capture, but in memory of their pool."""
    p = Problem()
    with monkeypatch.context() as patch:
        patch.setattr(copies, "ordinary", lambda tensors: False)
        for _ in range(3):
            assert same(p.codes(), p.fresh())
        assert copies.total_bytes() == 0
    p.codes()
    assert copies.total_bytes() > 0


def test_the_allocator_says_what_a_pool_owns(monkeypatch):
    segments = [
        {"address": 1000, "total_size": 100, "segment_pool_id": (0, 0)},
        {"address": 2000, "total_size": 100, "segment_pool_id": (0, 3)},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    backend = ["native"]
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend[0])

    def at(address, count=1):
        return SimpleNamespace(is_cuda=True, data_ptr=lambda: address, numel=lambda: count)

    assert copies.ordinary((at(1000), at(1099), at(2100)))
    assert not copies.ordinary((at(1000), at(2000))) and not copies.ordinary((at(2099),))
    assert copies.ordinary((at(1000), at(2050, count=0))), "an empty tensor is nowhere"
    backend[0] = "cudaMallocAsync"
    assert copies.ordinary((at(2000),))
    assert copies.ordinary((torch.zeros(1),))


if not INTERPRETING:  # only the test that starts the interpreter is left in this process
    for _name in [n for n in globals() if n.startswith("test_") and n != "test_in_the_interpreter"]:
        del globals()[_name]
