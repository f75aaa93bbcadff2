"""Short digests that tell one model, or one tokenizer, from another without reading all of it."""

import hashlib

import torch
from torch import nn

_PROBE = "The quick brown fox, 1234567890; naïve café — 東京.\n\n\tdef f(x): return x ** 2"


def model_fingerprint(model: nn.Module) -> str:
    """16 hex digits from the class, and every parameter's name, shape and first eight values."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{list(parameter.shape)}".encode())
        if parameter.device.type != "meta":
            head = parameter.detach().flatten()[:8].to("cpu", torch.float32)
            digest.update(head.numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer) -> str:
    """16 hex digits from the vocabulary size and the ids of a fixed text."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    special = [getattr(tokenizer, f"{n}_token_id", None) for n in ("bos", "eos", "pad")]
    return hashlib.sha256(f"{len(tokenizer)} {ids} {special}".encode()).hexdigest()[:16]
