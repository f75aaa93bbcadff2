"""Every op of fastsae on one page: schema, dispatch, fake and gradient.

Public ops ask `backend.call`; names that begin with an underscore are leaf ops, which csrc/
implements per device (one dispatch key holds one kernel, so a leaf has no other implementation).
All tensors are 2-D or 1-D and contiguous here: the public functions in fastsae/ops/<op>.py flatten
leading dimensions.
"""

import torch
from torch import Tensor

from fastsae.ops import backend, csr, residual, watch
from fastsae.ops.steer import SteerTable

lib = torch.library.Library("fastsae", "DEF")

for schema in (
    "topk(Tensor x, int k, str backend) -> (Tensor values, Tensor indices)",
    "encode_topk(Tensor x, Tensor W_enc, Tensor b_enc, int k, Tensor? b_dec, str precision,"
    " str backend) -> (Tensor values, Tensor indices)",
    "encode_threshold(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, Tensor? b_dec,"
    " str backend) -> (Tensor values, Tensor indices, Tensor row_offsets)",
    "encode_threshold_padded(Tensor x, Tensor W_enc, Tensor b_enc, Tensor threshold, int capacity,"
    " Tensor? b_dec, str backend) -> (Tensor values, Tensor indices, Tensor counts)",
    "csr_to_padded(Tensor values, Tensor indices, Tensor row_offsets)"
    " -> (Tensor values, Tensor indices)",
    "decode(Tensor values, Tensor indices, Tensor W_dec, Tensor? b_dec, str backend) -> Tensor",
    "gather_dot(Tensor g, Tensor W, Tensor indices, str backend) -> Tensor",
    "sparse_outer(Tensor values, Tensor indices, Tensor g, int F, str backend)"
    " -> (Tensor dW, Tensor db)",
    "mi_topk(Tensor features, Tensor words, int top, str objective, float temperature, str backend)"
    " -> (Tensor scores, Tensor indices)",
    "steer(Tensor x, Tensor slots, Tensor strengths, Tensor[] table, str backend) -> Tensor",
    "steer_residual_(Tensor(a!) hidden, Tensor(b!)? residual, Tensor active, Tensor slots,"
    " Tensor strengths, Tensor[] table, Tensor? stages, Tensor[] members, int k, float dose,"
    " Tensor? watched, Tensor[] watch, Tensor(c!)? sums, Tensor(d!)? maxima,"
    " Tensor(e!)? seconds) -> ()",
    "watch_(Tensor x, Tensor r, Tensor slots, Tensor[] table, Tensor(a!) sums, Tensor(b!) maxima)"
    " -> ()",
):
    lib.define(schema)

LEAVES: tuple[str, ...] = (
    "_topk_rows(Tensor x, int k) -> (Tensor, Tensor)",
    "_decode_rows(Tensor values, Tensor indices, Tensor W, Tensor? b) -> Tensor",
    "_holds_codes(Tensor dense, Tensor values, Tensor indices) -> bool",
    "_gather_dot(Tensor g, Tensor W, Tensor indices) -> Tensor",
    "_sparse_outer(Tensor values, Tensor indices, Tensor g, int F) -> (Tensor, Tensor)",
    "_encode_topk(Tensor x, Tensor W, Tensor b_enc, Tensor? b_dec, int k, bool exact, bool screen,"
    " Tensor[] copy, int candidates, int workspace) -> (Tensor, Tensor, int)",
    "_encode_threshold(Tensor x, Tensor W, Tensor b_enc, Tensor? b_dec, Tensor threshold,"
    " bool screen, Tensor[] copy, int candidates, int workspace) -> (Tensor, Tensor, Tensor, int)",
    "_encode_centre(Tensor x, Tensor? b_dec) -> Tensor",
    "_encode_copy(Tensor W, Tensor centre, bool bytes) -> (Tensor, Tensor, Tensor)",
    "_encode_digest(Tensor W) -> int",
    "_encode_stages() -> Tensor",
    "_release_workspaces() -> int",
    "_residual_rows(Tensor hidden, Tensor? residual, Tensor slots, Tensor strengths,"
    " Tensor? finish, Tensor? watched) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "_residual_put(Tensor(a!) hidden, Tensor(b!)? residual, Tensor x, Tensor y, Tensor index,"
    " Tensor watched, Tensor(c!)? seconds, float took) -> ()",
    "_watch_rows(Tensor x, Tensor r, Tensor slots, Tensor[] table, Tensor(a!) sums,"
    " Tensor(b!) maxima) -> ()",
    "_code_gradients(Tensor values, Tensor indices, Tensor g, Tensor x, Tensor W)"
    " -> (Tensor, Tensor, Tensor)",
    "_train_rows(Tensor values, Tensor indices, Tensor g, Tensor x, Tensor db_dec,"
    " Tensor? extra_slot, Tensor[] extra, Tensor(a!)[] state, float lr, float beta1, float beta2,"
    " float eps, int t) -> ()",
    "_mi_words(Tensor words, int parts) -> Tensor",
    "_mi_product(Tensor features, Tensor word_tiles, int V, int parts, float scale,"
    " Tensor(a!)[] sums, Tensor(b!)[] logits) -> ()",
    "_mi_columns(Tensor logits, float scale, Tensor(a!) maximum, Tensor(b!) sum) -> ()",
    "_mi_topk(Tensor logits, Tensor column_lse, float scale, int objective, float log_features,"
    " int top) -> (Tensor, Tensor)",
    "_steer_rows(Tensor x, Tensor slots, Tensor strengths, Tensor[] table) -> Tensor",
    "_steer_tokens(Tensor x, Tensor? mask, Tensor? ids, int base, int end, int first, Tensor slots,"
    " Tensor strengths, Tensor on_prompt, Tensor on_generated, Tensor? lengths, int phase,"
    " Tensor(a!) counts, Tensor(b!) out, Tensor[] table) -> ()",
    "_set_isa(str name) -> int",
    "_get_isa() -> str",
)
for schema in LEAVES:
    lib.define(schema)


# --- dispatch: the op is the call path, the backend is chosen inside it -------------------------


def _topk(x, k, which):
    return backend.call("topk", which, (x,), x, k)


def _encode_topk(x, W_enc, b_enc, k, b_dec, precision, which):
    return backend.call("encode_topk", which, (x, W_enc), x, W_enc, b_enc, k, b_dec, precision)


def _encode_threshold(x, W_enc, b_enc, threshold, b_dec, which):
    return backend.call("encode_threshold", which, (x, W_enc), x, W_enc, b_enc, threshold, b_dec)


def _encode_threshold_padded(x, W_enc, b_enc, threshold, capacity, b_dec, which):
    arguments = (x, W_enc, b_enc, threshold, capacity, b_dec)
    return backend.call("encode_threshold_padded", which, (x, W_enc), *arguments)


def _decode(values, indices, W_dec, b_dec, which):
    return backend.call("decode", which, (values, W_dec), values, indices, W_dec, b_dec)


def _gather_dot(g, W, indices, which):
    return backend.call("gather_dot", which, (g, W), g, W, indices)


def _sparse_outer(values, indices, g, F, which):
    return backend.call("sparse_outer", which, (values, g), values, indices, g, F)


def _mi_topk(features, words, top, objective, temperature, which):
    return backend.call(
        "mi_topk", which, (features, words), features, words, top, objective, temperature
    )


def _steer(x, slots, strengths, table, which):
    return backend.call("steer", which, (x, table[0]), x, slots, strengths, SteerTable(*table))


for name, function in (
    ("topk", _topk),
    ("encode_topk", _encode_topk),
    ("encode_threshold", _encode_threshold),
    ("encode_threshold_padded", _encode_threshold_padded),
    ("csr_to_padded", csr.pad),  # moves numbers, computes none: plain torch on every device
    ("decode", _decode),
    ("gather_dot", _gather_dot),
    ("sparse_outer", _sparse_outer),
    ("mi_topk", _mi_topk),
    ("steer", _steer),
    ("steer_residual_", residual.steer_residual),  # where to steer; `steer` chooses the backend
):
    lib.impl(name, function, "CPU")
    lib.impl(name, function, "CUDA")
lib.impl("watch_", watch.watch_on_cpu, "CPU")  # elsewhere a graph may fuse what it does


def _code_gradients(values, indices, g, x, W):
    with torch.cuda.device(g.device):  # as in backend.call: Triton launches on the current device
        return backend.kernel("sparse_outer", "code_gradients")(values, indices, g, x, W)


lib.impl("_code_gradients", _code_gradients, "CUDA")  # csrc/ has it for the CPU


# --- fakes: shapes and dtypes for torch.compile and export -------------------------------------


def _float(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _fake(name):
    return torch.library.register_fake(f"fastsae::{name}", lib=lib)


@_fake("topk")
def _(x, k, backend):
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int32)


@_fake("encode_topk")
def _(x, W_enc, b_enc, k, b_dec, precision, backend):
    n = x.shape[0]
    return x.new_empty(n, k, dtype=_float(x, W_enc)), x.new_empty(n, k, dtype=torch.int32)


@_fake("encode_threshold")
def _(x, W_enc, b_enc, threshold, b_dec, backend):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(nnz, dtype=_float(x, W_enc)),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


@_fake("encode_threshold_padded")
def _(x, W_enc, b_enc, threshold, capacity, b_dec, backend):
    shape = x.shape[0], capacity
    integers = x.new_empty(shape, dtype=torch.int32), x.new_empty(shape[0], dtype=torch.int32)
    return x.new_empty(shape, dtype=_float(x, W_enc)), *integers


@_fake("csr_to_padded")
def _(values, indices, row_offsets):
    shape = row_offsets.shape[0] - 1, torch.library.get_ctx().new_dynamic_size(min=1)
    return values.new_empty(shape), indices.new_empty(shape)


@_fake("decode")
def _(values, indices, W_dec, b_dec, backend):
    dtype = torch.promote_types(values.dtype, W_dec.dtype)
    return values.new_empty(values.shape[0], W_dec.shape[1], dtype=dtype)


@_fake("gather_dot")
def _(g, W, indices, backend):
    return g.new_empty(indices.shape, dtype=_float(g, W))


@_fake("sparse_outer")
def _(values, indices, g, F, backend):
    dtype = _float(values, g)
    return g.new_empty(F, g.shape[1], dtype=dtype), g.new_empty(F, dtype=dtype)


@_fake("mi_topk")
def _(features, words, top, objective, temperature, backend):
    shape = features.shape[0], top
    dtype = _float(features, words)
    return features.new_empty(shape, dtype=dtype), features.new_empty(shape, dtype=torch.int32)


@_fake("steer")
def _(x, slots, strengths, table, backend):
    return torch.empty_like(x)


@_fake("watch_")
def _(x, r, slots, table, sums, maxima):
    return None


@_fake("steer_residual_")
def _(hidden, residual, active, slots, strengths, table, stages, members, k, dose, *watch):
    return None


# --- gradients: every differentiable input of every differentiable output ----------------------
# topk, mi_topk and steer have no gradient: topk of a dense tensor is torch's business, scores are
# not trained, and steering serves. Their public functions detach, so that backward raises and no
# backend differs. decode, gather_dot and sparse_outer are each other's gradients.


def _decode_setup(ctx, inputs, output):
    values, indices, W_dec, b_dec, which = inputs
    ctx.save_for_backward(values, indices, W_dec)
    ctx.which, ctx.bias_dtype = which, None if b_dec is None else b_dec.dtype


def _decode_backward(ctx, g):
    values, indices, W_dec = ctx.saved_tensors
    dvalues = dW = db = None
    g = g.contiguous()
    if ctx.needs_input_grad[0]:
        dots = torch.ops.fastsae.gather_dot(g, W_dec, indices, ctx.which)
        dvalues = dots.to(values.dtype)
    if ctx.needs_input_grad[2]:
        dW, _ = torch.ops.fastsae.sparse_outer(values, indices, g, W_dec.shape[0], ctx.which)
        dW = dW.to(W_dec.dtype)
    if ctx.needs_input_grad[3]:
        db = g.sum(0).to(ctx.bias_dtype)
    return dvalues, None, dW, db, None


def _csr_setup(ctx, inputs, output):
    values, _indices, row_offsets = inputs
    ctx.save_for_backward(row_offsets)
    ctx.nnz = values.shape[0]
    ctx.mark_non_differentiable(output[1])


def _csr_backward(ctx, dpadded, _dcolumns):
    (row_offsets,) = ctx.saved_tensors
    return dpadded[csr.entries(row_offsets, ctx.nnz)], None, None


def _gather_dot_setup(ctx, inputs, output):
    g, W, indices, ctx.which = inputs
    ctx.save_for_backward(g, W, indices)


def _gather_dot_backward(ctx, ddots):
    g, W, indices = ctx.saved_tensors
    ddots, dg, dW = ddots.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        dg = torch.ops.fastsae.decode(ddots, indices, W, None, ctx.which).to(g.dtype)
    if ctx.needs_input_grad[1]:
        dW, _ = torch.ops.fastsae.sparse_outer(ddots, indices, g, W.shape[0], ctx.which)
        dW = dW.to(W.dtype)
    return dg, dW, None, None


def _sparse_outer_setup(ctx, inputs, output):
    values, indices, g, _F, ctx.which = inputs
    ctx.save_for_backward(values, indices, g)


def _sparse_outer_backward(ctx, ddW, ddb):
    values, indices, g = ctx.saved_tensors
    ddW, dvalues, dg = ddW.contiguous(), None, None
    if ctx.needs_input_grad[0]:
        dots = torch.ops.fastsae.gather_dot(g, ddW, indices, ctx.which)
        dvalues = (dots + ddb[indices.long()]).to(values.dtype)
    if ctx.needs_input_grad[2]:
        dg = torch.ops.fastsae.decode(values, indices, ddW, None, ctx.which).to(g.dtype)
    return dvalues, None, dg, None, None


def _encode_backward(ctx, dvalues, indices, x, W_enc, b_dec):
    """dx, dW_enc, db_enc, db_dec from the gradient of the active values, all without [N, K, D]."""
    dx = dW = db_enc = db_dec = None
    needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
    if needs_x or ctx.needs_b_dec:
        dx32 = torch.ops.fastsae.decode(dvalues, indices, W_enc, None, ctx.which)
        dx = dx32.to(x.dtype) if needs_x else None
        db_dec = -dx32.sum(0).to(b_dec.dtype) if ctx.needs_b_dec else None
    if needs_W or needs_b:
        shifted = x.to(dvalues.dtype)
        shifted = shifted if b_dec is None else shifted - b_dec.to(dvalues.dtype)
        dW, db_enc = torch.ops.fastsae.sparse_outer(
            dvalues, indices, shifted, W_enc.shape[0], ctx.which
        )
        dW, db_enc = dW.to(W_enc.dtype), db_enc.to(ctx.bias_dtype)
    return dx, dW, db_enc, db_dec


def _encode_topk_setup(ctx, inputs, output):
    x, W_enc, b_enc, _k, b_dec, _precision, which = inputs
    values, indices = output
    ctx.save_for_backward(x, W_enc, b_dec, values, indices)
    ctx.which, ctx.bias_dtype = which, b_enc.dtype
    ctx.needs_b_dec = ctx.needs_input_grad[4]
    ctx.mark_non_differentiable(indices)


def _encode_topk_backward(ctx, dvalues, _dindices):
    x, W_enc, b_dec, values, indices = ctx.saved_tensors
    active = torch.where(values != 0, dvalues, 0)
    dx, dW, db_enc, db_dec = _encode_backward(ctx, active, indices, x, W_enc, b_dec)
    return dx, dW, db_enc, None, db_dec, None, None


def _encode_threshold_setup(ctx, inputs, output):
    x, W_enc, b_enc, _threshold, b_dec, which = inputs
    _values, indices, row_offsets = output
    ctx.save_for_backward(x, W_enc, b_dec, indices, row_offsets)
    ctx.which, ctx.bias_dtype = which, b_enc.dtype
    ctx.needs_b_dec = ctx.needs_input_grad[4]
    ctx.mark_non_differentiable(indices, row_offsets)


def _encode_threshold_backward(ctx, dvalues, _dindices, _doffsets):
    x, W_enc, b_dec, indices, row_offsets = ctx.saved_tensors
    padded, columns = torch.ops.fastsae.csr_to_padded(dvalues, indices, row_offsets)
    dx, dW, db_enc, db_dec = _encode_backward(ctx, padded, columns, x, W_enc, b_dec)
    return dx, dW, db_enc, None, db_dec, None


def _encode_threshold_padded_setup(ctx, inputs, output):
    x, W_enc, b_enc, _threshold, _capacity, b_dec, which = inputs
    _values, indices, counts = output
    ctx.save_for_backward(x, W_enc, b_dec, indices, counts)
    ctx.which, ctx.bias_dtype = which, b_enc.dtype
    ctx.needs_b_dec = ctx.needs_input_grad[5]
    ctx.mark_non_differentiable(indices, counts)


def _encode_threshold_padded_backward(ctx, dvalues, _dindices, _dcounts):
    x, W_enc, b_dec, indices, counts = ctx.saved_tensors
    slot = torch.arange(indices.shape[1], device=indices.device)
    active = torch.where(slot < counts[:, None], dvalues, 0)
    dx, dW, db_enc, db_dec = _encode_backward(ctx, active, indices, x, W_enc, b_dec)
    return dx, dW, db_enc, None, None, db_dec, None


for name, backward, setup in (
    ("decode", _decode_backward, _decode_setup),
    ("gather_dot", _gather_dot_backward, _gather_dot_setup),
    ("sparse_outer", _sparse_outer_backward, _sparse_outer_setup),
    ("encode_topk", _encode_topk_backward, _encode_topk_setup),
    ("encode_threshold", _encode_threshold_backward, _encode_threshold_setup),
    (
        "encode_threshold_padded",
        _encode_threshold_padded_backward,
        _encode_threshold_padded_setup,
    ),
    ("csr_to_padded", _csr_backward, _csr_setup),
):
    torch.library.register_autograd(f"fastsae::{name}", backward, setup_context=setup, lib=lib)
