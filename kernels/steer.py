"""Steering in one launch: a program per row walks the operations of the row's slot.

The whole residual stays in registers in fp32, because every operation needs full-row dots with the
residual that the operations before it left. All policy state is read from device tables, so the
launch has one shape whatever the policies are and can be captured in a graph. A row in slot 0 is
copied bit for bit after one load; so is a row whose gate is closed.
"""

import torch
import triton
import triton.language as tl
from fastsae.kernels.cast import round_to
from torch import Tensor

MAX_D = 16384


@triton.jit
def _activations(r, enc, bias, theta, row, inside, columns, D):
    """a = h·1[h > max(θ, 0)] with h = ⟨w, r⟩ + bias of BLOCK_I items; NaN stays NaN."""
    weights = tl.load(
        enc + row[:, None] * D + columns[None, :],
        mask=inside[:, None] & (columns < D)[None, :],
        other=0.0,
    )
    h = tl.sum(weights * r[None, :], axis=1) + tl.load(bias + row, mask=inside, other=0.0)
    floor = tl.load(theta + row, mask=inside, other=0.0)
    floor = tl.where(floor < 0, 0.0, floor)
    return tl.where((h <= floor) | (inside == 0), 0.0, h)


@triton.jit
def _coefficients(kind, value, a, magnitude):
    """Factors of the decoder rows: 1 amplify, 2 calibrate, 3 floor, 4 add, 5 enforce (times Σv)."""
    gap = tl.where(kind == 5, magnitude, value) - a
    raised = tl.where(gap < 0, 0.0, gap)  # keeps NaN, unlike tl.maximum
    return tl.where(
        kind == 1,
        value * a,
        tl.where(kind == 2, gap, tl.where(kind == 4, value, raised)),
    )


@triton.jit(do_not_specialize=["S", "P"])
def _steer_kernel(
    x,
    slots,
    strengths,
    out,
    enc,
    bias,
    theta,
    dec,
    op_kind,
    op_begin,
    op_end,
    op_scalar,
    item_row,
    item_value,
    gate_begin,
    gate_end,
    gate_above,
    norm_preserve,
    D,
    S,
    P,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    raw = tl.load(x + n * D + columns, mask=columns < D, other=0.0)
    slot = tl.load(slots + n).to(tl.int64)
    passes = (slot > 0) & (slot < S)
    if (slot < 0) | (slot >= S):
        # A kernel cannot raise, and a wrong slot must show: it makes the row NaN.
        raw = tl.full([BLOCK_D], float("nan"), x.dtype.element_ty)
    if passes:
        r = raw.to(tl.float32)
        begin = tl.load(gate_begin + slot)
        end = tl.load(gate_end + slot)
        if end > begin:
            total = 0.0
            for start in range(begin, end, BLOCK_I):
                item = start + tl.arange(0, BLOCK_I)
                inside = item < end
                row = tl.load(item_row + item, mask=inside, other=0).to(tl.int64)
                a = _activations(r, enc, bias, theta, row, inside, columns, D)
                total += tl.sum(a, axis=0)
            # Rounded as on a CPU, not a GPU's approximate quotient: a mean may equal the bound.
            mean = tl.div_rn(total, (end - begin).to(tl.float32))
            passes = mean >= tl.load(gate_above + slot)
    if passes:
        r = raw.to(tl.float32)
        strength = tl.load(strengths + n)
        for p in range(P):
            kind = tl.load(op_kind + slot * P + p)
            if kind != 0:
                begin = tl.load(op_begin + slot * P + p)
                end = tl.load(op_end + slot * P + p)
                magnitude = tl.load(op_scalar + slot * P + p)
                delta = tl.zeros([BLOCK_D], tl.float32)
                total = 0.0
                for start in range(begin, end, BLOCK_I):
                    item = start + tl.arange(0, BLOCK_I)
                    inside = item < end
                    row = tl.load(item_row + item, mask=inside, other=0).to(tl.int64)
                    value = tl.load(item_value + item, mask=inside, other=0.0)
                    a = tl.zeros([BLOCK_I], tl.float32)
                    if kind != 4:
                        a = _activations(r, enc, bias, theta, row, inside, columns, D)
                    coefficient = _coefficients(kind, value, a, magnitude)
                    coefficient = tl.where(inside, coefficient, 0.0)
                    used = coefficient != 0
                    directions = tl.load(
                        dec + row[:, None] * D + columns[None, :],
                        mask=used[:, None] & (columns < D)[None, :],
                        other=0.0,
                    )
                    delta += tl.sum(coefficient[:, None] * directions, axis=0)
                    total += tl.sum(coefficient, axis=0)
                if kind == 5:
                    moved = r + strength * magnitude * (delta / total)
                    before = tl.sqrt_rn(tl.sum(r * r, axis=0))
                    after = tl.sqrt_rn(tl.sum(moved * moved, axis=0))
                    r = tl.where((total > 0) & (after > 0), moved * tl.div_rn(before, after), r)
                else:
                    r += strength * delta
        if tl.load(norm_preserve + slot) != 0:
            original = raw.to(tl.float32)
            before = tl.sqrt_rn(tl.sum(original * original, axis=0))
            after = tl.sqrt_rn(tl.sum(r * r, axis=0))
            r = tl.where(after > 0, r * tl.div_rn(before, after), r)
        tl.store(out + n * D + columns, round_to(r, out.dtype.element_ty), mask=columns < D)
    else:
        tl.store(out + n * D + columns, raw, mask=columns < D)


def _config(D: int) -> dict:
    """BLOCK_I weight rows of BLOCK_D floats: at most 32 registers a thread up to D = 8192."""
    block_d = max(128, triton.next_power_of_2(D))
    block_i = max(1, min(4, 16384 // block_d))
    warps = min(16, max(4, block_d // 128))
    # Without an explicit limit ptxas spills a scalar or two to reach a higher occupancy.
    return {"BLOCK_I": block_i, "BLOCK_D": block_d, "num_warps": warps, "maxnreg": 128}


def steer(x: Tensor, slots: Tensor, strengths: Tensor, table) -> Tensor:
    """Every row's operations in order on its fp32 residual; a new [N, D] tensor of x's dtype.

    x [N, D] float32/bfloat16/float16, slots [N] int32, strengths [N] float32, `table` a
    `fastsae.ops.steer.SteerTable` (float32 and int32 buffers on x's device). Rows of slot 0 and
    rows whose gate is closed are copied bit for bit, rows of a slot outside [0, S) become NaN.
    Above D = 8192 registers spill: slower, no less exact. D > 16384 raises ValueError. One launch,
    no host synchronisation.
    """
    N, D = x.shape
    if D > MAX_D:
        raise ValueError(
            f"x: got rows of {D}, the Triton kernel holds at most {MAX_D} in registers; "
            'pass backend="reference"'
        )
    out = torch.empty_like(x)
    if out.numel() == 0:
        return out
    _steer_kernel[(N,)](
        x,
        slots,
        strengths,
        out,
        table.enc,
        table.bias,
        table.theta,
        table.dec,
        table.op_kind,
        table.op_begin,
        table.op_end,
        table.op_scalar,
        table.item_row,
        table.item_value,
        table.gate_begin,
        table.gate_end,
        table.gate_above,
        table.norm_preserve,
        D,
        *table.op_kind.shape,
        enable_fp_fusion=True,
        **_config(D),
    )
    return out


def _aot(dtype: str, D: int):
    config = _config(D)
    options = {name: config.pop(name) for name in ("num_warps", "maxnreg")}
    floats = ("enc", "bias", "theta", "dec", "op_scalar", "item_value", "gate_above")
    integers = ("op_kind", "op_begin", "op_end", "item_row", "gate_begin", "gate_end")
    signature = {"x": f"*{dtype}:16", "out": f"*{dtype}:16", "strengths": "*fp32:16"}
    signature |= dict.fromkeys(("slots", "norm_preserve", *integers), "*i32:16")
    signature |= dict.fromkeys(floats, "*fp32:16")
    signature |= {"D": "i32:16", "S": "i32", "P": "i32"}
    return _steer_kernel, signature, config, options


# Compile cases for benchmarks/gpu_compile.py: (kernel, signature, constexprs, options).
AOT = [_aot("fp32", 640), _aot("bf16", 2048), _aot("bf16", 4096), _aot("bf16", 8192)]
