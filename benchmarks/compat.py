"""Measures other libraries' own objects before and after fastsae.compat.accelerate.

    make bench-compat                                       # makes .venv-peers, then runs
    python -P benchmarks/compat.py [--quick] [--only saelens_decode] [--out FILE.csv]

"native" is the accelerated object, the other providers are the same class with the same weights as
it is. Everything goes through the library's API: encode returns (and fills) the dense [N, F]
tensor, decode takes what that library's own encode returned. No model is downloaded.
"""

import copy
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import peer_models as models
from common import Case, parser, run_all
from peers import TRAIN_ROUNDS, Problem, dense_rows
from problems import close, randn
from targets import OURS, SHAPES, TRAIN

from fastsae import compat
from fastsae.ops import reference

MEAN_L0 = 64
MODEL = {"n_layers": 4, "d_model": 512, "n_ctx": 128, "d_head": 64, "n_heads": 8, "d_vocab": 8192}
SEQUENCES = 4
BATCHES = 4


def pair(name: str, sae) -> dict:
    """The object as its library has it, and an accelerated copy of it."""
    return {OURS: compat.accelerate(copy.deepcopy(sae)), name: sae}


def encode_case(N: int, D: int, F: int, k: int) -> Case:
    p = Problem(N, D, F, k)
    wanted = torch.zeros_like(p.h).scatter_(1, *reversed(p.codes()))
    saes = pair("SAELens", models.topk("SAELens", *p.weights, k))

    def check(name, result):
        close(name, dense_rows(result, p.rows, F), wanted, 1e-5)

    providers = {
        n: functools.partial(lambda sae, call: sae.encode(p.x), s) for n, s in saes.items()
    }
    return Case("saelens_encode", p.shape, "float32", providers, check, flops=p.flops, base=OURS)


def jumprelu_case(N: int, D: int, F: int, active: int) -> Case:
    p = Problem(N, D, F, active)
    level = torch.topk(p.h.flatten(), active * p.h.shape[0]).values[-1].item()
    threshold = torch.full((F,), max(level, 0.0))
    doubtful = (p.h - threshold).abs() < 1e-4
    wanted = torch.where((p.h > threshold) & ~doubtful, p.h, 0)
    saes = pair("SAELens", models.jumprelu(*p.weights, threshold))

    def check(name, result):
        close(name, torch.where(doubtful, 0, dense_rows(result, p.rows, F)), wanted, 1e-5)

    providers = {
        n: functools.partial(lambda sae, call: sae.encode(p.x), s) for n, s in saes.items()
    }
    op = "saelens_encode_jumprelu"
    return Case(op, p.shape, "float32", providers, check, flops=p.flops, base=OURS)


def decode_case(N: int, D: int, F: int, k: int) -> Case:
    p = Problem(N, D, F, k)
    wanted = reference.decode(*p.codes(), p.W_dec, p.b_dec)
    saes = pair("SAELens", models.topk("SAELens", *p.weights, k))
    with torch.no_grad():
        acts = {name: sae.encode(p.x) for name, sae in saes.items()}

    def check(name, result):
        close(name, result[p.rows], wanted, 1e-5)

    providers = {
        n: functools.partial(lambda sae, acts, call: sae.decode(acts), s, acts[n])
        for n, s in saes.items()
    }
    return Case("saelens_decode", p.shape, "float32", providers, check, base=OURS)


def forward_case(N: int, D: int, F: int, k: int) -> Case:
    p = Problem(N, D, F, k)
    wanted = reference.decode(*p.codes(), p.W_dec, p.b_dec)
    saes = pair("SAELens", models.topk("SAELens", *p.weights, k))

    def check(name, result):
        close(name, result[p.rows], wanted, 1e-5)

    providers = {n: functools.partial(lambda sae, call: sae(p.x), s) for n, s in saes.items()}
    return Case("saelens_forward", p.shape, "float32", providers, check, flops=p.flops, base=OURS)


def hooked_case(N: int, D: int, F: int, k: int) -> Case:
    """A forward pass of a random GPT-2-like TransformerLens model through one SAE, in tokens."""
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    size = MODEL | {"d_model": D, "n_heads": D // MODEL["d_head"]}
    config = HookedTransformerConfig(**size, act_fn="gelu_new", device="cpu")
    model = HookedSAETransformer(config).eval()
    tokens = torch.randint(0, MODEL["d_vocab"], (N // MODEL["n_ctx"], MODEL["n_ctx"]))
    p = Problem(1, D, F, k)
    sae = models.topk("SAELens", *p.weights, k)
    sae.cfg.metadata.hook_name = f"blocks.{MODEL['n_layers'] // 2}.hook_resid_post"
    saes = pair("SAELens", sae)
    answers = {}

    def check(name, result):
        answers[name] = result[:, :, :64].double()
        first = next(iter(answers.values()))
        close(name, answers[name], first, 1e-4)

    def run(sae, call):
        model.reset_saes()
        model.add_sae(sae)
        return model(tokens)

    providers = {n: functools.partial(run, s) for n, s in saes.items()}
    shape = {"N": N, "D": D, "F": F, "k": k}
    return Case("hooked_forward", shape, "float32", providers, check, base=OURS)


def sparsify_train_case(N: int, D: int, F: int, k: int) -> Case:
    """A whole step in the order of sparsify's Trainer, AuxK and Adam included."""
    with torch.inference_mode(False), torch.enable_grad():
        xs = [randn(N, D, device="cpu", seed=20 + i) for i in range(BATCHES)]
        start = models.TrainingStart(D, F, k)
        steps = {OURS: start.sparsify(compat.accelerate), "sparsify": start.sparsify()}
        wanted = start.loss(xs[0])
    return _training("sparsify_train_step", xs, steps, wanted, (N, D, F, k))


def saelens_train_case(N: int, D: int, F: int, k: int) -> Case:
    """ "SAELens sparse" trains with COO codes, which SAELens recommends for float32 and small k."""
    with torch.inference_mode(False), torch.enable_grad():
        xs = [randn(N, D, device="cpu", seed=20 + i) for i in range(BATCHES)]
        start = models.TrainingStart(D, F, k)
        steps = {
            OURS: start.saelens(compat.accelerate),
            "SAELens": start.saelens(lambda sae: sae),
            "SAELens sparse": start.saelens(),
        }
        wanted = start.loss(xs[0])
    return _training("saelens_train_step", xs, steps, wanted, (N, D, F, k))


def _training(op: str, xs: list, steps: dict, wanted, size: tuple) -> Case:
    def check(name, result):
        close(name, result, wanted, 1e-4)

    def step(name, call):
        with torch.inference_mode(False), torch.enable_grad():
            return steps[name](xs[call % BATCHES])

    providers = {name: functools.partial(step, name) for name in steps}
    shape = dict(zip("NDFk", size, strict=True))
    flops = 2 * size[0] * size[1] * size[2]
    return Case(op, shape, "float32", providers, check, flops=flops, base=OURS, rounds=TRAIN_ROUNDS)


def cases(quick: bool) -> list[tuple]:
    """(op, maker, shape) in the order of the table."""
    inference = (
        ("saelens_encode", encode_case),
        ("saelens_decode", decode_case),
        ("saelens_forward", forward_case),
    )
    training = (
        ("sparsify_train_step", sparsify_train_case),
        ("saelens_train_step", saelens_train_case),
    )
    if quick:
        few = (64, 256, 4096, 16)
        found = [*inference, ("saelens_encode_jumprelu", jumprelu_case), *training]
        return [(op, maker, few) for op, maker in found]
    found = [(op, maker, SHAPES[name]) for op, maker in inference for name in "ABC"]
    found += [
        ("saelens_encode_jumprelu", jumprelu_case, (*SHAPES[name][:3], MEAN_L0)) for name in "ABC"
    ]
    tokens = SEQUENCES * MODEL["n_ctx"]
    found.append(("hooked_forward", hooked_case, (tokens, MODEL["d_model"], 32768, 32)))
    return [*found, *((op, maker, TRAIN) for op, maker in training)]


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.split("\n")[0]).parse_args(arguments)
    if options.device != "cpu":
        raise SystemExit("--device: peers are measured on the CPU; use --device cpu")
    makers = [(op, functools.partial(maker, *size)) for op, maker, size in cases(options.quick)]
    return run_all(makers, options)


if __name__ == "__main__":
    sys.exit(main())
