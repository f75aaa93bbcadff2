"""The problems that are measured: tensors, float64 oracles and the comparison with them."""

import functools

import torch
from targets import MM_BF16, MM_FP32, OUT

from fastsae import ops

BF16, F32 = torch.bfloat16, torch.float32
CHECKED_ROWS = 8  # rows compared with float64; the oracle of a whole GPU shape would not fit
MASSIVE = 8  # dimensions that hold half of ‖x‖² when activations are massive


def randn(*shape: int, device: str, dtype=F32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(dtype)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def close(name: str, got: torch.Tensor, oracle: torch.Tensor, limit: float) -> None:
    """‖got - oracle‖ <= limit ‖oracle‖: fp32 sums are far below 1e-5, bf16 results near 2e-3."""
    error = ((got.double() - oracle).norm() / oracle.norm().clamp(min=1e-30)).item()
    assert error <= limit, f"{name}: relative error {error:.3g}, accepted {limit:.0e}"


def limit_of(result: torch.Tensor) -> float:
    return 1e-5 if result.dtype == F32 else 1e-2


class Encoder:
    """x, W_enc of unit rows and a b_enc around -1, as a trained encoder has, with its floors.

    x and W have the same type: torch cannot multiply two types, and who holds bf16 weights has
    bf16 activations. `massive`: half of ‖x‖² lies in eight dimensions, nearly constant over the
    tokens, as in the residual streams of Gemma.
    """

    def __init__(self, device: str, N: int, D: int, F: int, kept: int, dtype, massive=False):
        x = randn(N, D, device=device, seed=3)
        if massive:
            signs = randn(MASSIVE, device=device, seed=4).sign()
            x[:, :MASSIVE] = signs * (1 + 0.1 * x[:, :MASSIVE]) * ((D - MASSIVE) / MASSIVE) ** 0.5
        self.x = x = x.to(dtype)
        self.W = W = randn(F, D, device=device, dtype=dtype, seed=1).div_(D**0.5)
        self.b = randn(F, device=device, seed=2) * 0.1 - 1
        self.typed_b = self.b.to(dtype)
        self.rows = slice(0, min(N, CHECKED_ROWS))
        self.h = torch.cat([x[self.rows].double() @ w.double().T for w in W.split(4096)], 1)
        self.h += self.b.double()
        self.floors = floors(x, W)
        self.base = MM_BF16 if dtype == BF16 or N > 16 else MM_FP32
        # x and W are read once, `kept` pairs (value, index) a row are written.
        self.traffic = (N * D + F * D) * x.element_size() + N * kept * 8
        self.flops = 2 * N * D * F
        self.shape = {"N": N, "D": D, "F": F, "k": kept}

    def dense(self) -> torch.Tensor:
        return torch.addmm(self.typed_b, self.x, self.W.T)


def floors(x: torch.Tensor, W: torch.Tensor) -> dict:
    """The product x Wᵀ alone: as users call it, and (CPU) into an output that exists already.

    Both in the given type and, from fp32, in bf16 with operands that were cast beforehand.
    """
    found = {}
    for dtype in {x.dtype: 0, BF16: 0}:
        typed, weights = x.to(dtype), W.to(dtype)
        name = f"torch.mm {name_of(dtype)}"
        found[name] = functools.partial(product, typed, weights, None)
        if x.device.type == "cpu":
            out = typed.new_empty(x.shape[0], W.shape[0])
            found[name + OUT] = functools.partial(product, typed, weights, out)
    return found


def product(x: torch.Tensor, W: torch.Tensor, out: torch.Tensor | None, _call) -> torch.Tensor:
    return torch.mm(x, W.T, out=out)


class Codes:
    """Sparse codes with distinct indices in a row, weights W [F, D] and a gradient g [N, D]."""

    def __init__(self, device: str, N: int, D: int, F: int, k: int, dtype):
        generator = torch.Generator(device).manual_seed(5)
        self.values = randn(N, k, device=device, seed=5).abs()
        start = torch.randint(0, F, (N, 1), generator=generator, device=device)
        step = torch.randint(1, F // k, (N, k), generator=generator, device=device).cumsum(1)
        self.indices = ((start + step) % F).int()
        self.W = randn(F, D, device=device, dtype=dtype, seed=1)
        self.g = randn(N, D, device=device, dtype=dtype, seed=6)
        self.rows = slice(0, min(N, CHECKED_ROWS))
        self.shape = {"N": N, "D": D, "F": F, "k": k}
        # K weight rows, values and indices are read per token, one row is read or written.
        self.traffic = N * (k * D * self.W.element_size() + 8 * k + D * 4)


def steer_table(device: str, D: int, items: int) -> ops.SteerTable:
    """Slot 0 is empty; slot 1 amplifies `items` features in one operation."""
    ints = functools.partial(torch.tensor, dtype=torch.int32, device=device)
    zeros, scale = functools.partial(torch.zeros, device=device), D**-0.5
    return ops.SteerTable(
        enc=randn(items, D, device=device, seed=7) * scale,
        bias=zeros(items),
        theta=zeros(items),
        dec=randn(items, D, device=device, seed=8) * scale,
        op_kind=ints([[0], [1]]),
        op_begin=ints([[0], [0]]),
        op_end=ints([[0], [items]]),
        op_scalar=zeros(2, 1),
        item_row=torch.arange(items, dtype=torch.int32, device=device),
        item_value=torch.ones(items, device=device),
        gate_begin=ints([0, 0]),
        gate_end=ints([0, 0]),
        gate_above=zeros(2),
        norm_preserve=ints([0, 0]),
    )
