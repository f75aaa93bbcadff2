"""Measures every op against torch at the reference shapes, after verifying it on the same tensors.

    python -P benchmarks/ops.py [--device cpu|cuda] [--quick] [--only topk decode] [--out FILE.csv]
    python -P benchmarks/ops.py --profile [--only encode_topk] [--out FILE.csv]

Providers: see cases.py; `torch.mm ...` is the matrix product alone, the floor that an encoder is
judged against, as users call it and, with `out=`, without its allocation. On CUDA a provider is
also measured as the replay of a CUDA graph. The run ends with a verdict on every target of
targets.py that its rows can judge. `--profile` shows instead where the time goes inside an op.
"""

import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cases import (
    decode_case,
    encode_threshold_case,
    encode_topk_case,
    gather_dot_case,
    mi_topk_case,
    roofline_case,
    sparse_outer_case,
    steer_case,
    topk_case,
)
from common import parser, run_all
from problems import BF16, F32
from stages import profile_all
from targets import MI_SHAPES, SHAPES, STEER

GPU_D, GPU_F, GPU_K = 4096, 65536, 32
MEAN_L0 = 64


def cpu_cases(quick: bool) -> list[tuple]:
    """(maker, arguments) in the order of the table."""
    roofs = ("read", "copy", "mm float32", "mm bfloat16")
    cases = [(roofline_case, (what,)) for what in roofs]
    if quick:
        shape = (64, 512, 8192, 32, F32)
        sparse = [encode_topk_case, encode_threshold_case, decode_case, gather_dot_case]
        cases += [(topk_case, (64, 16384, 32, F32))]
        cases += [(maker, shape) for maker in (*sparse, sparse_outer_case)]
        cases += [(encode_topk_case, (1, 512, 8192, 32, dtype)) for dtype in (F32, BF16)]
        return [*cases, (mi_topk_case, (1024, 1000, 256)), (steer_case, (1, 512, 16, F32))]
    few, low = ("C", "C4", "E"), SHAPES.items()
    cases += [(topk_case, (64, 65536, 32, F32, state)) for state in ("cold", "cold L2", "hot")]
    cases += [(encode_topk_case, (*shape, F32)) for _, shape in low]
    cases += [(encode_topk_case, (*SHAPES[name], BF16)) for name in few]
    cases += [(encode_topk_case, (*SHAPES[name], F32, True)) for name in ("A", "C")]
    cases += [(encode_threshold_case, (*shape[:3], MEAN_L0, F32)) for _, shape in low]
    cases += [(encode_threshold_case, (*SHAPES[name][:3], MEAN_L0, BF16)) for name in few]
    cases += [(decode_case, (*SHAPES[name], F32)) for name in "ABC"]
    cases += [(maker, (*SHAPES["A"], F32)) for maker in (gather_dot_case, sparse_outer_case)]
    cases += [(mi_topk_case, shape) for shape in MI_SHAPES]
    cases += [(steer_case, (*STEER, F32, idle)) for idle in (False, True)]
    return cases


def cuda_cases(quick: bool) -> list[tuple]:
    sizes = (1, 64, 1024) if quick else (1, 16, 64, 4096, 16384)
    many, sae = sizes[-1], (GPU_D, GPU_F, GPU_K)
    cases = [(roofline_case, (what,)) for what in ("read", "copy", "mm bfloat16")]
    cases += [(topk_case, (n, GPU_F, GPU_K, BF16)) for n in (1, 64, many)]
    cases += [(topk_case, (many, GPU_F, 256, BF16)), (topk_case, (1024, GPU_F, 1024, F32))]
    cases += [(encode_topk_case, (n, *sae, BF16)) for n in sizes]
    cases += [(encode_topk_case, (n, *sae, F32)) for n in (1, 8, 16, 1024)]
    cases += [(encode_topk_case, (many, 768, GPU_F, GPU_K, BF16))]
    cases += [(encode_threshold_case, (n, GPU_D, GPU_F, 64, BF16)) for n in (64, min(many, 4096))]
    cases += [(decode_case, (n, *sae, BF16)) for n in sizes if n != 16]
    cases += [(decode_case, (min(many, 4096), *sae, F32))]
    cases += [(maker, (many, *sae, BF16)) for maker in (gather_dot_case, sparse_outer_case)]
    words = (8192 if quick else 65536, 5000, GPU_D, 20)
    cases += [(mi_topk_case, (*words, dtype)) for dtype in (BF16, F32)]
    cases += [(steer_case, (n, GPU_D, items, BF16)) for n in (1, 64) for items in (4, 64)]
    return [*cases, (steer_case, (64, GPU_D, 64, BF16, True))]


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__.split("\n")[0])
    options.add_argument("--profile", action="store_true", help="where the time goes (CPU)")
    options = options.parse_args(arguments)
    if options.profile and options.device != "cpu":
        raise SystemExit("--profile: it times calls on the CPU; use --device cpu")
    cases = (cpu_cases if options.device == "cpu" else cuda_cases)(options.quick)
    makers = [
        (maker.__name__.removesuffix("_case"), functools.partial(maker, options.device, *shape))
        for maker, shape in cases
    ]
    return (profile_all if options.profile else run_all)(makers, options)


if __name__ == "__main__":
    sys.exit(main())
