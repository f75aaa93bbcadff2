"""Every op in plain torch: the oracle of the tests, and what runs where nothing is compiled.

float64 in gives float64 out; every other floating type is computed in float32. No function
materialises [N, F] or [F, V] beyond a tile of 64 MB. Formulas: see the public functions in
fastsae/ops/<op>.py.
"""

import math
import threading
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor

from fastsae.ops import csr

TILE_BYTES = 64 << 20


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is float64, else float32 (pre-activations are never in half)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


_precision_lock = threading.Lock()
_precision_users = 0
_precision_restore: list[Callable[[], None]] = []


def _make_exact(setting) -> None:
    """torch keeps the state twice, and CUDA products raise when the two disagree.

    So what was set through `set_float32_matmul_precision` is changed and restored through that, and
    what was set through the newer `fp32_precision` (then the older getter raises) through that.
    """
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "highest"
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
        _precision_restore.append(partial(torch.set_float32_matmul_precision, legacy))
    before = setting.fp32_precision
    if before not in ("none", "ieee"):
        setting.fp32_precision = "ieee"
        _precision_restore.append(partial(setattr, setting, "fp32_precision", before))


@contextmanager
def full_precision(device: torch.device):
    """Matrix products in full fp32 whatever the process-wide flags and autocast say.

    `set_float32_matmul_precision("medium")` turns CPU fp32 products into bf16 ones (error 0.38
    where 8.6e-5 is expected); an exact engine must not inherit that. The flags belong to the
    process, so the first thread in changes them and the last one out restores them.
    """
    global _precision_users
    with _precision_lock:
        _precision_users += 1
        _make_exact(
            (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul
        )
    autocast = torch.is_autocast_enabled(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
            yield
    finally:
        with _precision_lock:
            _precision_users -= 1
            while _precision_users == 0 and _precision_restore:
                _precision_restore.pop()()


def tiles(n: int, row_bytes: int):
    """Row slices of a problem with n rows so that one tile stays within TILE_BYTES."""
    step = max(1, TILE_BYTES // max(1, row_bytes))
    return (slice(i, min(i + step, n)) for i in range(0, n, step))


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    n, f = x.shape
    values, indices = x.new_empty(n, k), x.new_empty(n, k, dtype=torch.int32)
    # 8 bytes an entry: the running count of ties, or the indices of the sort, are int64.
    for rows in tiles(n, 8 * f):
        values[rows], indices[rows] = _topk_tile(x[rows], k)
    return values, indices


def _topk_tile(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if bool(torch.isnan(x).any()):
        values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
        return values[:, :k], indices[:, :k]
    last = torch.topk(x, k, dim=-1).values[:, -1:]
    above, equal = x > last, x == last
    wanted = k - above.sum(-1, keepdim=True)
    member = above | (equal & (equal.cumsum(-1) <= wanted))
    indices = member.nonzero()[:, 1].view(x.shape[0], k)
    values, order = torch.sort(x.gather(1, indices), dim=-1, descending=True, stable=True)
    return values, indices.gather(1, order)


def relu_with_padding(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """ReLU of descending top-k values; what is not active becomes padding.

    Padding has value 0 and the lowest indices that the row's active latents do not use, ascending.
    Those are below k, because k entries minus the active ones are wanted.
    """
    n, k = values.shape
    active = ~(values <= 0)
    count = active.sum(-1, keepdim=True)
    used = torch.zeros(n, k + 1, dtype=torch.bool, device=values.device)
    used.scatter_(1, torch.where(active, indices.long(), k).clamp(max=k), True)
    unused = torch.argsort(used[:, :k].to(torch.uint8), dim=-1, stable=True)
    slot = torch.arange(k, device=values.device)
    padding = unused.gather(1, (slot - count).clamp(min=0))
    return torch.where(active, values, 0), torch.where(active, indices, padding.to(indices.dtype))


def centred(x: Tensor, b_dec: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if b_dec is None else x.to(dtype) - b_dec.to(dtype)


def encode_topk(x, W_enc, b_enc, k, b_dec=None, precision="exact") -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x, W_enc)
    n, f = x.shape[0], W_enc.shape[0]
    values = torch.empty(n, k, dtype=dtype, device=x.device)
    indices = torch.empty(n, k, dtype=torch.int32, device=x.device)
    weights, bias = W_enc.to(dtype), b_enc.to(dtype)
    with full_precision(x.device):
        for rows in tiles(n, 8 * f):
            h = torch.addmm(bias, centred(x[rows], b_dec, dtype), weights.T)
            values[rows], indices[rows] = relu_with_padding(*_topk_tile(h, k))
    return values, indices


def encode_threshold(x, W_enc, b_enc, threshold, b_dec=None) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x, W_enc)
    n, f = x.shape[0], W_enc.shape[0]
    weights, bias = W_enc.to(dtype), b_enc.to(dtype)
    floor = threshold.to(dtype).clamp(min=0)
    values, indices, counts = [], [], [torch.zeros(1, dtype=torch.int64, device=x.device)]
    with full_precision(x.device):
        for rows in tiles(n, 8 * f):
            h = torch.addmm(bias, centred(x[rows], b_dec, dtype), weights.T)
            row, column = (~(h <= floor)).nonzero().unbind(1)
            values.append(h[row, column])
            indices.append(column.to(torch.int32))
            # Not a sum over the mask: that would make an int64 copy of it.
            counts.append(torch.bincount(row, minlength=h.shape[0]))
    if not values:
        empty = torch.empty(0, dtype=dtype, device=x.device)
        return empty, empty.to(torch.int32), counts[0]
    return torch.cat(values), torch.cat(indices), torch.cat(counts).cumsum(0)


def encode_threshold_padded(
    x, W_enc, b_enc, threshold, capacity, b_dec=None
) -> tuple[Tensor, Tensor, Tensor]:
    return csr.fit(*encode_threshold(x, W_enc, b_enc, threshold, b_dec), capacity)


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    n, d = values.shape[0], W_dec.shape[1]
    dtype = compute_dtype(values, W_dec)
    out = torch.empty(
        n, d, dtype=torch.promote_types(values.dtype, W_dec.dtype), device=values.device
    )
    for rows in tiles(n, values.shape[1] * d * 8):
        v = values[rows].to(dtype).unsqueeze(-1)
        # A zero entry is padding: it must not meet an Inf or NaN in a weight row it does not use.
        terms = torch.where(v == 0, 0, v * W_dec[indices[rows].long()].to(dtype))
        total = terms.sum(1)
        out[rows] = total if b_dec is None else total + b_dec.to(dtype)
    return out


def gather_dot(g: Tensor, W: Tensor, indices: Tensor) -> Tensor:
    n, k = indices.shape
    dtype = compute_dtype(g, W)
    out = torch.empty(n, k, dtype=dtype, device=g.device)
    for rows in tiles(n, k * W.shape[1] * 8):
        picked = W[indices[rows].long()].to(dtype)
        out[rows] = (picked * g[rows].to(dtype).unsqueeze(1)).sum(-1)
    return out


def sparse_outer(values: Tensor, indices: Tensor, g: Tensor, F: int) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(values, g)
    dW = torch.zeros(F, g.shape[1], dtype=dtype, device=g.device)
    db = torch.zeros(F, dtype=dtype, device=g.device)
    entries, features = values.to(dtype).flatten(), indices.flatten().long()
    token = torch.arange(values.numel(), device=g.device) // max(1, values.shape[1])
    # One stable sort groups the entries by feature in ascending token order: no atomics, one order.
    order = torch.argsort(features, stable=True)
    order = order[entries[order] != 0]
    for part in order.split(max(1, TILE_BYTES // (g.shape[1] * 8))):
        terms = entries[part, None] * g[token[part]].to(dtype)
        add_rows(dW, features[part], terms)
        add_rows(db, features[part], entries[part])
    return dW, db


def add_rows(out: Tensor, rows: Tensor, terms: Tensor) -> None:
    """out[rows] += terms in order: index_add_ is atomic on CUDA, index_put_ on the CPU."""
    if out.device.type == "cpu":
        out.index_add_(0, rows, terms)
    else:
        out.index_put_((rows,), terms, accumulate=True)


def mi_topk(features, words, top, objective="mi", temperature=1.0) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(features, words)
    n, v = features.shape[0], words.shape[0]
    f, w = features.to(dtype), words.to(dtype)
    column = torch.full((v,), -math.inf, dtype=dtype, device=f.device)
    scores = torch.empty(n, top, dtype=dtype, device=f.device)
    indices = torch.empty(n, top, dtype=torch.int32, device=f.device)
    with full_precision(f.device):
        if objective != "logit":
            for rows in tiles(n, 8 * v):
                logits = f[rows] @ w.T / temperature
                column = torch.logaddexp(column, logits.logsumexp(0))
        for rows in tiles(n, 8 * v):
            raw = f[rows] @ w.T
            scores[rows], indices[rows] = _topk_tile(
                _score(raw, column, n, objective, temperature), top
            )
    return scores, indices


def _score(raw: Tensor, column: Tensor, n_features: int, objective: str, temperature: float):
    """Scores of one feature tile from its raw logits and the column log-sum-exp log Σ_f e^(L/T)."""
    if objective == "logit":
        return raw
    logits = raw / temperature
    log_p_f = logits - column
    if objective == "pmi":
        return log_p_f
    p_v = logits.softmax(-1)
    return p_v * (log_p_f + math.log(n_features)) if objective == "mi" else p_v * log_p_f


def steer(x: Tensor, slots: Tensor, strengths: Tensor, table) -> Tensor:
    out = x.clone()
    with full_precision(x.device):
        for slot in slots.unique().tolist():
            if slot != 0:
                rows = (slots == slot).nonzero()[:, 0]
                out[rows] = _steer_slot(x[rows], slot, strengths[rows], table)
    return out


def _steer_slot(x: Tensor, slot: int, strengths: Tensor, t) -> Tensor:
    dtype = compute_dtype(x, t.enc)
    r, s = x.to(dtype), strengths.to(dtype).unsqueeze(-1)

    def acts(begin: int, end: int) -> tuple[Tensor, Tensor]:
        rows = t.item_row[begin:end].long()
        h = r @ t.enc[rows].to(dtype).T + t.bias[rows].to(dtype)
        floor = t.theta[rows].to(dtype).clamp(min=0)
        return torch.where(h <= floor, 0, h), t.dec[rows].to(dtype)

    gate = int(t.gate_begin[slot]), int(t.gate_end[slot])
    passes = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    if gate[1] > gate[0]:
        passes = acts(*gate)[0].mean(-1) >= t.gate_above[slot]
    for p in range(t.op_kind.shape[1]):
        kind, begin, end = int(t.op_kind[slot, p]), int(t.op_begin[slot, p]), int(t.op_end[slot, p])
        if kind == 0 or end <= begin:
            continue
        a, d = acts(begin, end)
        value = t.item_value[begin:end].to(dtype)
        if kind == 5:
            r = _enforce(r, a, d, s, t.op_scalar[slot, p].to(dtype))
            continue
        coefficient = {
            1: lambda a=a, value=value: value * a,
            2: lambda a=a, value=value: value - a,
            3: lambda a=a, value=value: (value - a).clamp(min=0),
            4: lambda a=a, value=value: value.expand_as(a),
        }[kind]()
        r = r + s * (coefficient @ d)
    if int(t.norm_preserve[slot]):
        before, after = x.to(dtype).norm(dim=-1, keepdim=True), r.norm(dim=-1, keepdim=True)
        r = torch.where(after > 0, r * (before / after), r)
    return torch.where(passes.unsqueeze(-1), r.to(x.dtype), x)


def _enforce(r: Tensor, a: Tensor, d: Tensor, s: Tensor, magnitude: Tensor) -> Tensor:
    v = (magnitude - a).clamp(min=0)
    total = v.sum(-1, keepdim=True)
    moved = r + s * magnitude * ((v / total.clamp(min=torch.finfo(v.dtype).tiny)) @ d)
    before, after = r.norm(dim=-1, keepdim=True), moved.norm(dim=-1, keepdim=True)
    return torch.where((total > 0) & (after > 0), moved * (before / after), r)
