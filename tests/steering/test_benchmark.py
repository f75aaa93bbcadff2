"""benchmarks/steering.py: ratios are medians of pairs, targets judge what bytes do not explain."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="not a checkout: no benchmarks/")
WEIGHTS, ENCODER = 1000, 20
COLUMNS = "device clocks threads torch triton fastsae commit date command".split()


@pytest.fixture(scope="module")
def bench():
    before = set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    yield SimpleNamespace(
        steering=importlib.import_module("steering"), targets=importlib.import_module("targets")
    )
    sys.path.remove(str(BENCHMARKS))
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def condition(times: list, hook: float | None = None):
    """Tokens that take the given milliseconds, one after another; `handle` where it has hooks."""
    made, times = SimpleNamespace(ids=torch.ones(1, 1), hooks=[]), iter(times)
    made.model, made.bare = SimpleNamespace(dtype=torch.bfloat16), hook is None

    def token():
        made.hooks.append(hook or 0.0)
        return next(times), torch.zeros(1, 3)

    made.token = token
    return made


@pytest.fixture
def compare(bench):
    def compare(name, base, ours, **more):
        """Of as many pairs as there are numbers, the rows and the verdicts on them."""
        options = {"base_name": "unsteered", "agree": torch.equal, "rounds": len(ours) - 2} | more
        made = bench.steering.Comparison(name=name, base=base, condition=ours_of(ours), **options)
        bench.steering.measure([made], None)
        common = dict.fromkeys(COLUMNS, "") | {"threads": 2}
        sae = SimpleNamespace(config=SimpleNamespace(d_in=4, d_sae=8, k=2))
        rows = made.rows(sae, WEIGHTS, common)
        return made, rows, bench.targets.verdicts(rows)

    def ours_of(ours):
        return condition(ours, hook=0.4)

    return compare


def test_a_ratio_is_the_median_of_pairs_not_of_times(compare):
    # The first is the verification, the second the warm-up; then each pair is 0.8 % apart.
    base = [9.0, 9.0, 50.0, 60.0, 40.0, 90.0, 70.0]
    ours = [9.0, 900.0, *(time * 1.008 for time in base[2:])]
    made, rows, verdicts = compare("features", condition(base), ours)
    assert made.ratios() == pytest.approx([1.008] * 2)
    token, _, hooks, _ = rows
    assert token.ratio == pytest.approx(1.008) and token.p50_ms == pytest.approx(60 * 1.008)
    assert hooks.p50_ms == pytest.approx(0.4) and hooks.ratio == pytest.approx(0.4 / 60)
    assert [v.measured for v in verdicts] == pytest.approx([0.008, 0.4 / 60])
    assert all(v.met for v in verdicts) and verdicts[0].shown == "+0.80%"


def test_the_bytes_of_the_encoder_are_allowed_for(compare):
    base = [50.0] * 5
    for added, met in ((0.039, True), (0.041, False)):
        ours = [50.0 * (1 + added)] * 5
        _, _, (verdict, _) = compare("membership", condition(base), ours, extra_bytes=ENCODER)
        assert verdict.measured == pytest.approx(added - ENCODER / WEIGHTS)
        assert verdict.met is met


def test_many_policies_are_compared_with_one(compare):
    for times, met in ((1.09, True), (1.11, False)):
        base, ours = condition([300.0] * 5, hook=0.5), [300.0 * times] * 5
        _, rows, (verdict,) = compare("policies", base, ours, base_name="one policy")
        assert verdict.met is met and len(rows) == 2  # the base has hooks of its own: no share


def test_wrong_logits_stop_the_run(compare):
    with pytest.raises(AssertionError, match=r"^idle: wrong logits"):
        compare("idle", condition([1.0] * 5), [1.0] * 5, agree=lambda a, b: False)


def test_being_first_of_a_pair_costs_neither(compare):
    # Whoever is first takes 30 ms more: the base in the first pair, the condition in the next.
    base = [50.0, 50.0, 80.0, 50.0, 80.0, 50.0]
    ours = [50.0, 50.0, 50.0, 80.0, 50.0, 80.0]
    made, _, _ = compare("features", condition(base), ours)
    assert made.ratios() == pytest.approx([1.0, 1.0])
