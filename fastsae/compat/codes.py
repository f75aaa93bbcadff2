"""Sparse codes behind dense tensors: what lets a dense API run at the speed of a sparse one.

The peers' `encode` returns a dense [..., F] tensor, and so do we; but the codes that filled it are
remembered for as long as that tensor lives. `decode` finds them again, proves that the tensor still
holds exactly these codes (one pass over its bits, so an edit through `.data`, NumPy or a view in
inference mode is seen too), and reads k rows of W_dec instead of F.

Gradients are those of the dense computation. The gradient of `decode` with respect to a dense code
is g · W_decᵀ, an [N, F] product; it is handed on unevaluated (`PendingGradient`), the encoder takes
the few entries that it needs, and anybody else who looks at it gets the whole product.
"""

import dataclasses
import math
import threading

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from fastsae import ops
from fastsae.compat import buffers
from fastsae.ops.csr import csr_to_padded
from fastsae.ops.decode import decode_dense, holds_codes

FAST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DENSE_SHARE = 16  # from F / 16 active latents a row on, a dense product beats gathering rows

_remembered = WeakTensorKeyDictionary()
_lock = threading.Lock()


@dataclasses.dataclass
class Codes:
    """Active latents of every row: values [N, K], indices [N, K] int32, padding has value 0.

    `state` is what the decoder must undo (normalisation, heads), of the object `owner`. `values`
    is None for a tensor of which only that is known. A `placeholder` holds nothing.
    """

    values: Tensor | None
    indices: Tensor | None
    features: int
    state: tuple = ()
    owner: int = 0
    placeholder: bool = False


def plain(*tensors: Tensor) -> bool:
    """Whether these are ordinary tensors of a type that the kernels serve, in ordinary execution.

    Under autocast, torch.compile, functorch transforms, and for float64 or tensor subclasses the
    peers' own code runs: it defines what happens there.
    """
    first = tensors[0]
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled(first.device.type)
        and all(
            type(t) in (Tensor, torch.nn.Parameter)
            and t.dtype in FAST_DTYPES
            and t.layout == torch.strided
            for t in tensors
        )
    )


def topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None) -> Codes:
    """ReLU of the k largest pre-activations of x [N, D]; W_enc [F, D]."""
    values, indices = ops.encode_topk(x, W_enc, b_enc, k, b_dec=b_dec)
    return Codes(values, indices, W_enc.shape[0])


def threshold(x: Tensor, W_enc: Tensor, b_enc: Tensor, theta, b_dec: Tensor | None = None) -> Codes:
    """h·1[h > θ]·1[h > 0] of x [N, D]; W_enc [F, D], θ [F] or a number."""
    found = ops.encode_threshold(x, W_enc, b_enc, theta, b_dec=b_dec)
    values, indices, _ = csr_to_padded(*found)
    return Codes(values, indices, W_enc.shape[0])


def dense(codes: Codes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The [*shape, F] tensor of the codes, which `recall` will recognise."""
    full = (*shape, codes.features)
    if torch.is_grad_enabled() and codes.values.requires_grad:
        out = _ToDense.apply(codes.values, codes.indices, full, dtype)
    else:
        out = _fill(codes.values, codes.indices, full, dtype)
    values = codes.values.detach().to(dtype)
    remember(out, dataclasses.replace(codes, values=values))
    return out


def placeholder(codes: Codes, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of the shape of the dense code that holds nothing: for a decoder that we know."""
    out = codes.values.new_zeros((), dtype=dtype).expand(*shape, codes.features)
    kept = dataclasses.replace(codes, values=codes.values.to(dtype), placeholder=True)
    remember(out, kept)
    return out


def remember(tensor: Tensor, codes: Codes) -> None:
    with _lock:
        _remembered[tensor] = codes


def recall(tensor: Tensor) -> Codes | None:
    with _lock:
        return _remembered.get(tensor)


def unedited(tensor: Tensor, codes: Codes) -> bool:
    """Whether the dense tensor holds exactly these codes: all of them, and nothing else."""
    if codes.placeholder:
        return True
    if codes.values is None or tensor.shape[-1] != codes.features:
        return False
    if tensor.dtype != codes.values.dtype or not tensor.is_contiguous():
        return False
    flat = tensor.detach().view(-1, codes.features)
    return len(flat) == len(codes.values) and holds_codes(flat, codes.values, codes.indices)


def decode(acts: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """acts · W_dec + b_dec for acts [..., F], by their codes where these are known and few.

    W_dec [F, D]. Returns [..., D] of the dtype of acts.
    """
    found = recall(acts)
    shape = (*acts.shape[:-1], W_dec.shape[1])
    if found is not None and unedited(acts, found):
        if found.placeholder:
            return ops.decode(found.values, found.indices, W_dec, b_dec).view(shape)
        if found.values.shape[1] * DENSE_SHARE > found.features:
            return acts @ W_dec + b_dec
        if torch.is_grad_enabled() and any(t.requires_grad for t in (acts, W_dec, b_dec)):
            return _Decode.apply(acts, found.values, found.indices, W_dec, b_dec)
        return ops.decode(found.values, found.indices, W_dec, b_dec).view(shape)
    used = int(torch.count_nonzero(acts.detach()))
    if used * DENSE_SHARE > acts.numel():
        return acts @ W_dec + b_dec
    return decode_dense(acts, W_dec, b_dec)


def _fill(values: Tensor, indices: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    out = buffers.zeros(shape, dtype, values.device)
    # Padding has value 0 and may name an index in use: adding it changes nothing.
    flat = out.view(math.prod(shape[:-1]), shape[-1])
    flat.scatter_add_(1, indices.long(), values.detach().to(dtype))
    return out


class _ToDense(torch.autograd.Function):
    """Values [N, K] at indices [N, K] into a dense tensor of `shape`."""

    @staticmethod
    def forward(ctx, values, indices, shape, dtype):
        ctx.save_for_backward(indices)
        ctx.dtype = values.dtype
        return _fill(values, indices, shape, dtype)

    @staticmethod
    def backward(ctx, g):
        (indices,) = ctx.saved_tensors
        if isinstance(g, PendingGradient):
            dvalues = ops.gather_dot(g.g, g.W, indices)
        else:
            dvalues = g.reshape(-1, g.shape[-1]).gather(1, indices.long())
        return dvalues.to(ctx.dtype), None, None, None


class _Decode(torch.autograd.Function):
    """acts · W_dec + b_dec by the codes of acts; the gradient of acts is pending."""

    @staticmethod
    def forward(ctx, acts, values, indices, W_dec, b_dec):
        ctx.save_for_backward(acts, values, indices, W_dec)
        ctx.bias_dtype = b_dec.dtype
        out = ops.decode(values, indices, W_dec, b_dec)
        return out.view(*acts.shape[:-1], W_dec.shape[1])

    @staticmethod
    def backward(ctx, g):
        acts, values, indices, W_dec = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1]).contiguous()
        dacts = dW = db = None
        if ctx.needs_input_grad[0]:
            if torch.is_grad_enabled():  # create_graph: everything must be differentiable again
                dacts = g @ W_dec.T
            else:
                dacts = PendingGradient(flat, W_dec, acts.shape)
        if ctx.needs_input_grad[3]:
            if torch.is_grad_enabled():
                read = acts.reshape(-1, acts.shape[-1]).gather(1, indices.long())
                values = torch.where(values != 0, read, 0)  # padding may name an index in use
            dW, _ = ops.sparse_outer(values, indices, flat, W_dec.shape[0])
            dW = dW.to(W_dec.dtype)
        if ctx.needs_input_grad[4]:
            db = flat.sum(0).to(ctx.bias_dtype)
        return dacts, None, None, dW, db


class PendingGradient(Tensor):
    """g · Wᵀ [..., F], computed when an operation reads it. g [N, D], W [F, D]."""

    @staticmethod
    def __new__(cls, g: Tensor, W: Tensor, shape: torch.Size):
        return Tensor._make_wrapper_subclass(cls, shape, dtype=g.dtype, device=g.device)

    def __init__(self, g: Tensor, W: Tensor, shape: torch.Size):
        self.g, self.W = g, W

    def __repr__(self, *, tensor_contents=None) -> str:
        return f"PendingGradient(shape={list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.evaluate, (args, kwargs or {}))
        return function(*args, **kwargs)

    def evaluate(self) -> Tensor:
        return (self.g @ self.W.T).view(self.shape)
