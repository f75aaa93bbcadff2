"""TrainConfig: everything that decides what a training run computes."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastsae.errors import FastsaeError
from fastsae.models import GEMMA, resolve_hook

# A checkpoint may be continued with other values of these: they change no weight (activation_cache
# and model_batch_size do, through the rounding of the activations, so they are not among them).
FREE_FIELDS = (
    "output",
    "checkpoint_every",
    "log_every",
    "resume",
    "device",
    "dtype",
    "stats_tokens",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train one SAE. Only layer, output and one of text and samples must be given.

    Units: *tokens are activations, i.e. kept tokens; *_steps are optimiser steps of batch_tokens.

    >>> TrainConfig(layer=9, output="sae", samples=1_000_000, epochs=4).k
    32
    """

    # What is read
    layer: int | str  # layer number or hook point, see fastsae.models.resolve_hook
    output: str  # directory of the SAE, the log and the checkpoints
    model: str = GEMMA  # name for load_model; only recorded when a module is passed to train()
    text: tuple[str, ...] = ()  # .txt, .txt.gz, .jsonl, .jsonl.gz files or folders of them
    samples: int = 0  # tokens to sample from the model itself, instead of text
    prompts: tuple[str, ...] = ()  # starts of the samples, e.g. words
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0  # of the samples
    ctx_len: int = 128  # tokens per sequence, BOS included
    pack: bool | None = None  # several documents per sequence; default: for text, not for samples
    skip_positions: int = 1  # positions left out at the start of every sequence
    tokens: int | None = None  # to train on; default: epochs times the corpus
    epochs: float = 1.0  # used when tokens is None
    # The SAE
    d_sae: int | None = None  # default: expansion times the model's width
    expansion: int = 8  # features per dimension of the residual stream, when d_sae is not given
    k: int = 32  # active features per token
    # The loss
    loss: str = "fvu"  # or "mse": the mean over tokens of ‖x̂−x‖² / ‖x‖²
    aux_coefficient: float = 1 / 32  # weight of AuxK; 0 turns it off
    k_aux: int | None = None  # default: min(512, width / 2); at most the number of dead features
    dead_after_tokens: int | None = None  # default: a twentieth of the run, at most 10 million
    outlier_norm: float = 5.0  # leave out tokens this many median distances from the mean; 0: none
    # The optimiser
    lr: float | None = None  # default: by d_sae and the number of steps, see default_lr
    warmup_steps: int | None = None  # default: a twentieth of the run, at most 1000
    decay_fraction: float = 0.2  # last part of the run, over which the rate falls linearly to 0
    batch_tokens: int = 4096  # activations per step
    seed: int = 0  # of everything random
    # How it runs
    model_batch_size: int | None = None  # sequences per run of the model; default: 4096 tokens
    buffer_tokens: int | None = None  # shuffle buffer; default: up to 131072 tokens and 512 MB
    activation_cache: str | None = "auto"  # a file to keep; "auto": a temporary one; "none"
    cache_gb: float = 8.0  # largest "auto" cache
    checkpoint_every: int = 500  # steps between checkpoints
    log_every: int = 10  # steps between records of the log
    eval_tokens: int = 16_384  # held out for the final metrics; at most a tenth of the corpus
    stats_tokens: int = 262_144  # over which the feature statistics are measured
    dtype: str = "float32"  # of the saved weights: float32, bfloat16 or float16
    model_dtype: str | None = None  # default: float32 on the CPU, bfloat16 on a GPU
    device: str | None = None  # default: cuda if there is one, else cpu
    resume: str = "auto"  # "auto": continue if there is a checkpoint; "must"; "never": start over

    def __post_init__(self):
        for name in ("text", "prompts"):
            value = getattr(self, name)
            value = (str(value),) if isinstance(value, str | Path) else tuple(map(str, value))
            object.__setattr__(self, name, value)
        object.__setattr__(self, "output", str(self.output))
        if self.activation_cache == "none":
            object.__setattr__(self, "activation_cache", None)
        resolve_hook(self.layer)
        if bool(self.text) == bool(self.samples):
            raise FastsaeError(
                "text, samples: give exactly one of them: text files, or a number of tokens to "
                "sample from the model itself"
            )
        self._check_numbers()
        self._choice("loss", "fvu", "mse")
        self._choice("resume", "auto", "must", "never")
        self._choice("dtype", "float32", "bfloat16", "float16")
        self._choice("model_dtype", None, "float32", "bfloat16", "float16")
        if self.d_sae is not None and self.k > self.d_sae:
            raise FastsaeError(f"k: got {self.k}, expected at most d_sae = {self.d_sae}")
        if self.buffer_tokens is not None and self.buffer_tokens < 2 * self.batch_tokens:
            raise FastsaeError(
                f"buffer_tokens: got {self.buffer_tokens}, expected at least 2·batch_tokens = "
                f"{2 * self.batch_tokens}"
            )

    def _check_numbers(self) -> None:
        positive = "expansion k batch_tokens checkpoint_every log_every".split()
        optional = "tokens d_sae k_aux dead_after_tokens model_batch_size buffer_tokens".split()
        for name in positive + [n for n in optional if getattr(self, n) is not None]:
            self._integer(name, 1)
        for name in ("samples", "seed", "skip_positions", "eval_tokens"):
            self._integer(name, 0)
        self._integer("stats_tokens", 1)
        self._integer("ctx_len", 2)
        if self.warmup_steps is not None:
            self._integer("warmup_steps", 0)
        self._range("epochs", lambda v: v > 0, "a positive number")
        self._range("temperature", lambda v: v > 0, "a positive number")
        self._range("top_p", lambda v: 0 < v <= 1, "a number in (0, 1]")
        self._range("aux_coefficient", lambda v: v >= 0, "a number of at least 0")
        self._range("decay_fraction", lambda v: 0 <= v <= 1, "a number from 0 to 1")
        self._range("cache_gb", lambda v: v >= 0, "a number of at least 0")
        self._range("outlier_norm", lambda v: v == 0 or v > 1, "a number above 1, or 0")
        if self.lr is not None:
            self._range("lr", lambda v: v > 0, "a positive number")

    def _integer(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FastsaeError(f"{name}: got {value!r}, expected an integer of at least {least}")

    def _range(self, name: str, inside: Callable[[float], bool], accepted: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not inside(value):
            raise FastsaeError(f"{name}: got {value!r}, expected {accepted}")

    def _choice(self, name: str, *accepted: str | None) -> None:
        if getattr(self, name) not in accepted:
            listed = ", ".join(map(str, accepted))
            raise FastsaeError(f"{name}: got {getattr(self, name)!r}, accepted are {listed}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `TrainConfig(**d)` is the inverse."""
        record = dataclasses.asdict(self)
        return record | {"text": list(self.text), "prompts": list(self.prompts)}


def default_lr(d_sae: int, steps: int) -> float:
    """2e-4 · sqrt(16384 / d_sae) · max(1, sqrt(20000 / steps)), at most 3e-3.

    The first factor is common practice for long runs (Gao et al. 2024); short runs need more.
    Gemma 3 270M, layer 9, d_sae 8192, 300 steps of 2048 tokens: FVU of the last 50 steps 0.215 at
    3e-4, 0.133 at 1e-3, 0.106 at 3e-3 (with 0, 0.03 and 6 % dead features).
    """
    return min(3e-3, 2e-4 * math.sqrt(16384 / d_sae) * max(1.0, math.sqrt(20_000 / steps)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A TrainConfig with its defaults filled in for one model and one corpus."""

    d_in: int
    d_sae: int
    steps: int
    k_aux: int
    dead_after_tokens: int
    lr: float
    warmup_steps: int
    decay_steps: int

    @classmethod
    def of(cls, config: TrainConfig, d_in: int, corpus_tokens: int) -> "Plan":
        """corpus_tokens: activations in one epoch."""
        c = config
        d_sae = c.d_sae or c.expansion * d_in
        if c.k > d_sae:
            raise FastsaeError(f"k: got {c.k}, expected at most d_sae = {d_sae}")
        tokens = c.tokens or max(1, round(c.epochs * corpus_tokens))
        steps = -(-tokens // c.batch_tokens)
        warmup = c.warmup_steps
        return cls(
            d_in=d_in,
            d_sae=d_sae,
            steps=steps,
            k_aux=c.k_aux or max(1, min(512, d_in // 2)),
            dead_after_tokens=c.dead_after_tokens or min(10_000_000, max(1, tokens // 20)),
            lr=c.lr or default_lr(d_sae, steps),
            warmup_steps=min(1000, steps // 20) if warmup is None else warmup,
            decay_steps=round(c.decay_fraction * steps),
        )

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0: linear warm-up, plateau, linear decay to 0."""
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = min(1.0, (self.steps - step) / (self.decay_steps + 1))
        return self.lr * min(rise, fall)
