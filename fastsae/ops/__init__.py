"""The ops of fastsae. Each takes `backend="reference" | "native" | "triton" | None`."""

from fastsae.ops import schema as _schema  # noqa: F401  registers the ops
from fastsae.ops.backend import BackendError
from fastsae.ops.decode import decode, gather_dot, sparse_outer
from fastsae.ops.encode import encode_threshold, encode_threshold_padded, encode_topk
from fastsae.ops.mi import mi_topk
from fastsae.ops.steer import SteerTable, steer
from fastsae.ops.topk import topk

__all__ = [
    "BackendError",
    "SteerTable",
    "decode",
    "encode_threshold",
    "encode_threshold_padded",
    "encode_topk",
    "gather_dot",
    "mi_topk",
    "sparse_outer",
    "steer",
    "topk",
]
