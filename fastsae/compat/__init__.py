"""Drop-in adapters: other libraries' objects on fastsae's kernels.

    sae = fastsae.compat.accelerate(SAE.from_pretrained(...))   # SAELens
    coder = fastsae.compat.accelerate(SparseCoder.load_from_hub(...))   # sparsify

`contracts` wraps a fastsae.SAE for tools that bring a protocol of their own.
"""

from fastsae.compat import dictionary_learning, saelens, sparsify
from fastsae.compat.buffers import release
from fastsae.compat.contracts import (
    DelphiCoder,
    RepsteerAdapter,
    SAEBenchSAE,
    SaklasBackend,
)
from fastsae.compat.swap import accelerated
from fastsae.errors import FastsaeError

__all__ = [
    "DelphiCoder",
    "RepsteerAdapter",
    "SAEBenchSAE",
    "SaklasBackend",
    "accelerate",
    "is_accelerated",
    "release",
    "restore",
]

_LIBRARIES = {
    "sae_lens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
}
_OPTIONS = {sparsify: ("pre_acts", "gradients")}


def accelerate(obj, **options):
    """Runs a SAELens SAE, sparsify SparseCoder or dictionary_learning dictionary on our kernels.

    Also a HookedSAETransformer: every SAE attached to it. Returns `obj` itself, changed in place:
    the same methods, shapes, dtypes, hooks and gradients; `restore(obj)` undoes it. Options exist
    for a SparseCoder: `pre_acts=True` fills EncoderOutput.pre_acts (None otherwise, it is [N, F]),
    `gradients="exact"` lets AuxK and Multi-TopK train the encoder, which sparsify means but does
    not do. Raises FastsaeError for what cannot be represented exactly, by name.
    """
    if _saes(obj) is not None:
        for sae in _saes(obj):
            accelerate(sae, **options)
        return obj
    if accelerated(obj):
        restore(obj)
    library = _library(obj)
    accepted = _OPTIONS.get(library, ())
    if unknown := [name for name in options if name not in accepted]:
        raise FastsaeError(
            f"options: got {', '.join(unknown)}, {type(obj).__name__} takes "
            f"{', '.join(accepted) or 'none'}"
        )
    library.accelerate(obj, **options)
    return obj


def restore(obj):
    """Undoes `accelerate`, in place; an object that is not accelerated stays as it is."""
    if _saes(obj) is not None:
        for sae in _saes(obj):
            restore(sae)
    elif accelerated(obj):
        _library(obj).restore(obj)
    return obj


def is_accelerated(obj) -> bool:
    """Whether `accelerate` is in effect: of all attached SAEs in the case of a model."""
    saes = _saes(obj)
    if saes is not None:
        return all(accelerated(sae) for sae in saes)
    return accelerated(obj)


def _saes(obj) -> list | None:
    attached = getattr(obj, "acts_to_saes", None)
    return None if attached is None else list(attached.values())


def _library(obj):
    name = type(obj).__module__.split(".")[0]
    if name not in _LIBRARIES:
        raise FastsaeError(
            f"obj: got {type(obj).__module__}.{type(obj).__name__}, accepted are SAEs of SAELens, "
            "SparseCoder of sparsify, dictionaries of dictionary_learning and a "
            "HookedSAETransformer with SAEs attached"
        )
    return _LIBRARIES[name]
