"""Measures what steering adds to a decoded token of Gemma 3 270M: inside the hooks, and end to end.

    python -P benchmarks/steering.py [--rounds 20] [--sae FOLDER]

Conditions, all attached to one layer of one model:
- idle: attached, no policy set; idle rows: [None] set
- 64 features: one policy that adds 64 features
- membership: 64 features with active="sae" on a top-k SAE, which encodes every token
- 1 policy, 256 policies: a batch of 256 rows that share a policy of 4 features, or have one each

The whole model varies from token to token by more than the hooks take. So "in the hooks" times
everything they run for one token, on a residual that the model made, after 64 MB of other memory
was written (a token of the model leaves nothing in the caches), and its ratio is to the median
token of the idle model. "a token" is end to end: the same position decoded again, the conditions
taking turns, medians. The limit of membership is the roofline share, the encoder's bytes over the
model's, + 2 %. Exit code 1 if the hooks miss a limit, or 256 policies cost more than 1.1 x one.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastsae
from fastsae import models
from fastsae.steering import Policy, add, amplify, attach

CONTEXT, WIDE = 64, 256


def policies() -> dict[str, tuple[int, list]]:
    """condition -> (rows, a policy per row)"""
    some = list(range(64))
    return {
        "idle": (1, None),
        "idle rows": (1, [None]),
        "64 features": (1, [Policy(add(some, 0.01))]),
        "membership": (1, [Policy(amplify(some, 0.01, active="sae"))]),
        "1 policy": (WIDE, [Policy(add([0, 1, 2, 3], 0.01))] * WIDE),
        "256 policies": (WIDE, [Policy(add(range(i, i + 4), 0.01)) for i in range(WIDE)]),
    }


def hook_call(handle, output: torch.Tensor) -> Callable[[], None]:
    """One decode step as the hooks see it: the trunk begins, the layer returns, the trunk ends."""
    host = handle._host
    tracker, (point,) = host.tracker, host.points.values()
    rows = output.shape[0]
    given = {
        "input_ids": torch.ones(rows, 1, dtype=torch.long),
        "attention_mask": torch.ones(rows, CONTEXT, dtype=torch.long),
        "past_key_values": Cache(),
    }

    def call():
        tracker.enter(None, (), given)
        point.after(None, (), output)
        tracker.leave(None, (), output)

    return call


class Cache:
    def get_seq_length(self) -> int:
        return CONTEXT - 1


@torch.inference_mode()
def microseconds(call: Callable[[], None], rounds: int) -> float:
    other, times = torch.empty(1 << 24), []
    for _ in range(3):
        call()
    for _ in range(2 * rounds):
        other.add_(1.0)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


@torch.inference_mode()
def tokens_ms(model, handle, conditions: dict, width: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of one decoded token per condition, the conditions taking turns."""
    ids = torch.randint(5, 1000, (1, CONTEXT)).expand(width, -1)
    cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    times = {name: [] for name, (rows, _) in conditions.items() if rows == width}
    for turn in range(rounds + 2):
        for name in times:
            rows = conditions[name][1]
            handle.set(rows)
            start = time.perf_counter()
            model(ids[:, :1], past_key_values=cache, use_cache=True)
            spent = time.perf_counter() - start
            cache.crop(-1)
            if turn > 1:
                times[name].append(spent * 1e3)
    return {name: statistics.median(each) for name, each in times.items()}


@torch.inference_mode()
def residual_of_a_token(model, layer: int) -> torch.Tensor:
    """[1, 1, D]: what the layer makes of the last of some tokens."""
    kept = []
    hook = models.decoder_layers(model)[layer].register_forward_hook(
        lambda module, args, output: kept.append(models.residual_of(output)[:, -1:].clone())
    )
    model(torch.randint(5, 1000, (1, CONTEXT)))
    hook.remove()
    return kept[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sae", default=str(Path(fastsae.__file__).parent / "demo" / "sae"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model, _ = models.load_model()
    sae = fastsae.SAE.from_pretrained(options.sae)
    conditions, micros, ends = policies(), {}, {}
    room = {"max_policies": WIDE}
    with attach(model, sae, **room) as handle:
        ((layer, _),) = handle.sites
    output = residual_of_a_token(model, layer)
    for name, (rows, listed) in conditions.items():
        with attach(model, sae, **room) as handle:
            handle.set(listed)
            call = hook_call(handle, output.expand(rows, -1, -1).contiguous())
            micros[name] = microseconds(call, options.rounds)
    with attach(model, sae, **room) as handle:
        ends |= tokens_ms(model, handle, conditions, 1, options.rounds)
        ends |= tokens_ms(model, handle, conditions, WIDE, max(3, options.rounds // 4))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    roof = sae.W_enc.numel() * sae.W_enc.element_size() / weights
    limits = {"idle": 0.005, "idle rows": 0.005, "64 features": 0.01, "membership": roof + 0.02}
    print(f"SAE {sae.config.d_sae} x {sae.config.d_in}; {torch.get_num_threads()} threads")
    missed = 0
    for name, value in micros.items():
        base = ends["idle" if name in limits else "1 policy"] * 1e3
        share, limit = value / base, limits.get(name)
        verdict = "" if limit is None else f"(limit {limit:.2%})"
        missed += limit is not None and share > limit
        print(
            f"{name:13} {value:8.1f} µs in the hooks {share:8.3%} {verdict:15} "
            f"{ends[name]:8.2f} ms a token"
        )
    # The two only differ in the hooks: the rest of the token is the same work.
    token = ends["1 policy"] * 1e3
    ratio = (token - micros["1 policy"] + micros["256 policies"]) / token
    inside = micros["256 policies"] / micros["1 policy"]
    print(
        f"256 policies: {ratio:.4f} x the token of one policy by the hooks' time, "
        f"{ends['256 policies'] / ends['1 policy']:.3f} x end to end, {inside:.2f} x in the hooks "
        "(limit 1.1 x a token)"
    )
    return int(missed > 0 or ratio > 1.1)


if __name__ == "__main__":
    sys.exit(main())
