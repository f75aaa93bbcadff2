"""Measures what steering adds to a decoded token of Gemma 3 270M: end to end, and inside the hooks.

    python -P benchmarks/steering.py [--quick] [--rounds 800] [--out FILE.csv] [--sae FOLDER]

Every condition decodes one and the same position again and again. It shares its module with its
base, whose tokens run with our hooks taken off (or with the base's policies set), untimed: another
copy of the model differs by half a per cent for where its parts and caches lie in memory.
Conditions, at one layer:
- idle: attached, no policy set; rows: [None] set
- features: one policy that adds 64 features
- membership: 64 features with active="sae" on a top-k SAE, which encodes every token
- policies: 256 rows with a policy of 4 features each, against 256 rows that share one

token_X: a token of the condition and one of its base follow each other, the order alternating; the
ratio is the median over pairs (two of them, one of each order, at a time), because two tokens of
the same kind differ by more than the hooks take, but neighbours less than others. Printed with it:
the interval that holds the median of 19 of 20 such runs (order statistics). hooks_X: the time
inside everything that fastsae put on the module, taken within those tokens, so caches are as cold
as they are in use; its ratio is to the median token without hooks. The time allowed to membership
is the share of bytes that the encoder adds to the model's, + 2 %.
"""

import copy
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import targets
from common import BUSY_CORES, parser, percentiles, table
from machine import Load, busy, machine, version
from rows import Row, write_csv

import fastsae
from fastsae import models
from fastsae.steering import Policy, add, amplify, attach

FEATURES, CONTEXT = 64, 64
WIDE, WIDE_CONTEXT = 256, 16  # longer ones mostly time how 256 caches grow by a token
ROUNDS, QUICK, FEWER = 800, 4, 4  # pairs per condition; wide batches make FEWER times fewer


class Condition:
    """A module that decodes the same position again: with our hooks and `policies`, or bare."""

    def __init__(self, model, ids: torch.Tensor, rows: int, sae, policies):
        kept = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self.model, self.hooks, self.spent = copy.deepcopy(model, kept), [], [0.0]
        self.policies, self.bare, self.shared = policies, False, False
        self.ids = ids[:, -1:].expand(rows, -1)
        self.mask = torch.ones(rows, ids.shape[1] + 1, dtype=torch.long)
        self.cache = self.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        self.cache.batch_repeat_interleave(rows)
        self.handle = attach(self.model, sae, max_policies=WIDE)
        self.handle.set(policies)
        self.placed = self._time_the_hooks()

    def other(self, policies) -> "Condition":
        """The same module with other policies: both set theirs before each token, untimed."""
        made = self.unsteered()
        made.bare, made.policies, made.shared = False, policies, True
        self.shared = True
        return made

    def unsteered(self) -> "Condition":
        """The same module without hooks: they are put on and taken off before a token, untimed."""
        made = copy.copy(self)
        made.bare, made.hooks = True, []
        return made

    def _time_the_hooks(self) -> list[tuple[dict, dict]]:
        """Wraps our hooks; returns each module's dictionary of hooks and what belongs in it."""
        placed = []
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in hooks.items():
                    assert hook.__module__.startswith("fastsae"), "a hook that is not ours"
                    hooks[key] = self._timed(hook)
                placed += [(hooks, dict(hooks))] if hooks else []
        return placed

    def _timed(self, hook: Callable) -> Callable:
        def call(*args):
            start = time.perf_counter()
            result = hook(*args)
            self.spent[0] += time.perf_counter() - start
            return result

        return call

    def token(self) -> tuple[float, torch.Tensor]:
        """(milliseconds, logits [rows, V]) of one decoded token."""
        for hooks, ours in self.placed:
            hooks.clear()
            hooks.update({} if self.bare else ours)
        if self.shared:
            self.handle.set(self.policies)
        self.spent[0], start = 0.0, time.perf_counter()
        logits = self.model(
            self.ids, attention_mask=self.mask, past_key_values=self.cache, use_cache=True
        ).logits
        spent = time.perf_counter() - start
        self.cache.crop(-1)
        self.hooks.append(self.spent[0] * 1e3)
        return spent * 1e3, logits[:, -1]


@dataclasses.dataclass
class Comparison:
    """A condition against its base; `agree` judges (logits of the base, logits of the condition).

    `extra_bytes`: what the condition must read beside the model's weights.
    """

    name: str
    base_name: str
    condition: Condition
    base: Condition
    agree: Callable
    rounds: int
    extra_bytes: int = 0

    def __post_init__(self):
        self.times: tuple[list, list] = ([], [])  # of the base, of the condition

    def verify(self) -> None:
        _, wanted = self.base.token()
        _, got = self.condition.token()
        assert got.isfinite().all(), f"{self.name}: logits are not finite"
        assert self.agree(wanted, got), f"{self.name}: wrong logits"

    def pair(self, number: int) -> None:
        for which in (0, 1) if number % 2 else (1, 0):
            times = (self.base, self.condition)[which].token()[0]
            self.times[which].append(times)

    def ratios(self) -> list[float]:
        """Ascending, one for two pairs: their geometric mean, free of what being first costs."""
        pairs = [ours / base for base, ours in zip(*self.times, strict=True)]
        return sorted(math.sqrt(a * b) for a, b in zip(pairs[::2], pairs[1::2], strict=False))

    def told(self) -> str:
        ratios = self.ratios()
        n, half = len(ratios), 0.98 * math.sqrt(len(ratios))
        low, high = (ratios[min(n - 1, max(0, round(n / 2 + s * half)))] for s in (-1, 1))
        return (
            f"{self.name:11} {statistics.median(ratios):.4f} x {self.base_name} "
            f"[{low:.4f}, {high:.4f}], {2 * n} pairs; in the hooks "
            f"{statistics.median(self.condition.hooks) * 1e3:.0f} µs"
        )

    def rows(self, sae, weights: int, common: dict) -> list[Row]:
        """The token's rows and, where the base has no hooks, those of the hooks' own time."""
        base, ours = (percentiles(times) for times in self.times)
        ratio, whole = statistics.median(self.ratios()), weights + self.extra_bytes
        shape = {"N": len(self.condition.ids), "D": sae.config.d_in, "F": sae.config.d_sae}

        def row(op, provider, times, ratio, bytes_) -> Row:
            unknown = dict.fromkeys(("V", "gbps", "tflops", "peak_mb", "output_mb", "kept_mb"))
            return Row(
                op=f"{op}_{self.name}",
                provider=provider,
                version=version("fastsae-engine" if provider == "native" else "torch"),
                **shape,
                k=sae.config.k,
                dtype=str(self.base.model.dtype).removeprefix("torch."),
                **dict(zip(("p20_ms", "p50_ms", "p80_ms"), times, strict=True)),
                base=self.base_name,
                ratio=ratio,
                traffic_bytes=bytes_,
                flops=0,
                **unknown,
                state="warm",
                **common,
            )

        found = [row("token", "native", ours, ratio, whole)]
        found += [row("token", self.base_name, base, 1.0, weights)]
        if self.base.bare:
            hooks = percentiles(self.condition.hooks)
            found.append(row("hooks", "native", hooks, hooks[1] / base[1], self.extra_bytes))
            found.append(row("hooks", self.base_name, base, 1.0, weights))
        return found


def comparisons(model, sae, rounds: int) -> list[Comparison]:
    ids = torch.randint(5, 1000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    some = list(range(FEATURES))
    encoder = sae.W_enc.numel() * sae.W_enc.element_size()

    def single(name: str, policies, agree: Callable, extra: int = 0) -> Comparison:
        steered = Condition(model, ids, 1, sae, policies)
        bare = steered.unsteered()
        return Comparison(name, "unsteered", steered, bare, agree, rounds, extra)

    def differ(a, b):
        return bool((a != b).any(-1).all())

    def first_alone(a, b):  # the first row has the same policy in both
        return torch.equal(a[0], b[0]) and differ(a[1:], b[1:])

    each = [Policy(add(range(i, i + 4), 0.5)) for i in range(WIDE)]
    shared = Condition(model, ids[:, :WIDE_CONTEXT], WIDE, sae, [each[0]] * WIDE)
    apart = shared.other(each)
    fewer = max(QUICK, rounds // FEWER)
    member = [Policy(amplify(some, 0.5, active="sae"))]
    return [
        single("idle", None, torch.equal),
        single("rows", [None], torch.equal),
        single("features", [Policy(add(some, 0.5))], differ),
        single("membership", member, differ, encoder),
        Comparison("policies", "one policy", apart, shared, first_alone, fewer),
    ]


@torch.inference_mode()
def measure(listed: list[Comparison], budget: float | None) -> None:
    """Verifies, warms up, then makes pairs of every comparison in turn."""
    for comparison in listed:
        comparison.verify()
    started = time.perf_counter()
    for number in range(-1, max(each.rounds for each in listed)):
        for each in listed:
            if number < each.rounds:
                each.pair(number)
        if number < 0:  # warm-up
            for each in listed:
                each.times[0].clear(), each.times[1].clear()
                each.condition.hooks.clear()
        if budget and time.perf_counter() - started > budget:
            break


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--sae", default=str(Path(fastsae.__file__).parent / "demo" / "sae"))
    options = options.parse_args(arguments)
    if options.device != "cpu":
        raise SystemExit("--device: got cuda, this benchmark measures the CPU")
    before, load = busy(), Load()
    model, _ = models.load_model("gemma3-270m")
    sae, common = fastsae.SAE.from_pretrained(options.sae), machine("cpu")
    rounds = options.rounds or (QUICK if options.quick else ROUNDS)
    with torch.inference_mode():
        listed = comparisons(model, sae, rounds)
    listed = [each for each in listed if not options.only or each.name in options.only]
    measure(listed, options.budget)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    rows = [row for each in listed for row in each.rows(sae, weights, common)]
    for each in listed:
        print(each.told())
    for case in targets.cases(rows):
        print(table(case))
    print(targets.summary(rows))
    others = max(before, load.others())
    if others > BUSY_CORES:
        print(f"busy machine, these times are no measurement: others use {others:.1f} cores")
    if options.out and (others <= BUSY_CORES or options.anyway):
        write_csv(options.out, rows)
        print(f"wrote {options.out}")
    elif options.out:
        print("not recorded: the machine is busy (--anyway records)", file=sys.stderr)
    return int(not all(verdict.met for verdict in targets.verdicts(rows)))


if __name__ == "__main__":
    sys.exit(main())
