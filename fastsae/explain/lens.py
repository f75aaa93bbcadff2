"""The tuned lens: a translator from one layer's residual to what the model's output layer reads."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsae.data import TokenStore, model_fingerprint, tokenize
from fastsae.errors import FastsaeError
from fastsae.explain.mi import _norm_in_fp32
from fastsae.models import (
    Hook,
    final_norm,
    hidden_size,
    hook_module,
    model_device,
    output_embedding,
    residual_of,
    resolve_hook,
)

_FORMAT = "fastsae-lens"
_HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class TunedLens:
    """translate(x) = x + A x + b, so that norm(translate(x)) gives the model's final logits.

    A: [D, D] float32; b: [D] float32. hook: the residual it reads, "layers.N.output" or ".input".
    model_name, fingerprint: the model it was fitted to. about: how, with the mean divergence from
    the model's own next-token distribution on held-out text before and after (nats per token).
    """

    A: Tensor
    b: Tensor
    hook: str
    model_name: str
    fingerprint: str
    about: dict[str, Any]

    def translate(self, x: Tensor) -> Tensor:
        """Residuals [..., D] -> [..., D], float32."""
        return x.float() + x.float() @ self.A.T + self.b

    def directions(self, rows: Tensor) -> Tensor:
        """d + A d: what adding d to a residual adds to its translation; [n, D] -> [n, D].

        This is what a decoder row goes through. b is a constant of the residual, on its scale of
        hundreds; added to unit rows it would drown them and give all features the same words.
        """
        A = self.A.to(rows.device)
        return rows.float() + rows.float() @ A.T

    @property
    def digest(self) -> str:
        """16 hex digits of A and b."""
        return hashlib.sha256(self.A.numpy().tobytes() + self.b.numpy().tobytes()).hexdigest()[:16]

    def check(self, model, hook: str | int | Hook | None = None) -> None:
        """Raise FastsaeError unless the lens was fitted to this model, and to this hook point."""
        found = model_fingerprint(model)
        if found != self.fingerprint:
            raise FastsaeError(
                f"lens: fitted to {self.model_name} ({self.fingerprint}), the model is another one "
                f"({found}; the dtype counts); fit one: fastsae train-lens"
            )
        if hook is not None and resolve_hook(hook) != resolve_hook(self.hook):
            raise FastsaeError(
                f"lens: fitted at {self.hook}, the SAE reads {hook}; fit one there: "
                f"fastsae train-lens --layer {_name(resolve_hook(hook))}"
            )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; `load` reads it back."""
        path = Path(path)
        names = ("hook", "model_name", "fingerprint", "about")
        meta = {"format": _FORMAT, "version": 1} | {name: getattr(self, name) for name in names}
        try:
            save_file({"A": self.A, "b": self.b}, path, {"fastsae": json.dumps(meta)})
        except (OSError, SafetensorError) as error:
            raise FastsaeError(f"{path}: cannot be written ({error})") from None
        return path

    @classmethod
    def load(cls, path: str | Path) -> "TunedLens":
        """Read what `save` wrote. Raises FastsaeError for a missing, damaged or other file."""
        try:
            with safe_open(Path(path), framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("fastsae", "{}"))
                if meta.get("format") != _FORMAT or meta.get("version") != 1:
                    raise FastsaeError(
                        f"{path}: holds no lens of this version of fastsae; "
                        "`fastsae train-lens` writes one"
                    )
                A, b = file.get_tensor("A"), file.get_tensor("b")
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise FastsaeError(f"{path}: cannot read a lens ({error})") from None
        names = ("hook", "model_name", "fingerprint", "about")
        return cls(A, b, **{name: meta[name] for name in names})


def _name(hook: Hook) -> str:
    return f"layers.{hook.layer}.{hook.side}"


class _Head:
    """The model's last step, logits = cap(norm(x) Uᵀ), and the divergence of two inputs of it."""

    def __init__(self, model):
        device = model_device(model)
        self.norm = _norm_in_fp32(final_norm(model), device)
        self.table = output_embedding(model).detach()
        head = model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        self.bias = None if bias is None else bias.detach().float()
        config = model.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[n, D] after the norm -> [n, vocabulary] float32, by products in the model's dtype.

        tokens: only these columns, then by products in float32.
        """
        if tokens is None:
            z = (hidden.to(self.table.dtype) @ self.table.T).float()
        else:
            z = hidden.float() @ self.table[tokens].float().T
        if self.bias is not None:
            z += self.bias if tokens is None else self.bias[tokens]
        return z if not self.cap else (z / self.cap).tanh_().mul_(self.cap)

    def divergence(self, translated: Tensor, target: Tensor, *, gradient: bool) -> Tensor:
        """KL(p ‖ q) summed over tokens, p from the model's own final hidden state `target`.

        With gradient=True it is carried to `translated`: ∂/∂logits = q − p (times the slope of
        the cap), multiplied out by hand, so no [n, vocabulary] tensor is kept for autograd.
        """
        hidden = self.norm(translated)
        with torch.no_grad():
            log_p = self.logits(target).log_softmax(-1)
            z = self.logits(hidden.detach())
            slope = None if not self.cap else 1 - (z / self.cap) ** 2
            log_q = z.log_softmax(-1)
            p = log_p.exp()
            loss = (p * log_p.sub_(log_q)).sum()
            if gradient:
                back = log_q.exp_().sub_(p)
                back = back if slope is None else back.mul_(slope)
                back = (back.to(self.table.dtype) @ self.table).float()
        if gradient:
            hidden.backward(back / len(hidden))
        return loss


class _Done(Exception):
    """Raised by the hook: the output layer itself is not needed."""


@torch.no_grad()
def _pairs(model, place: Hook, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(residual at the hook, input of the output layer) of the kept tokens: [n, D] float32."""
    layer, side = hook_module(model, place)
    found: list[Tensor] = []
    last: list[Tensor] = []

    def before(_module, args, kwargs):
        found.append(args[0] if args else kwargs["hidden_states"])

    def after(_module, _args, output):
        found.append(residual_of(output))

    def at_head(_module, args):
        last.append(args[0])
        raise _Done

    if side == "input":
        handles = [layer.register_forward_pre_hook(before, with_kwargs=True)]
    else:
        handles = [layer.register_forward_hook(after)]
    handles.append(model.get_output_embeddings().register_forward_pre_hook(at_head))
    try:
        model(input_ids=ids, use_cache=False)
    except _Done:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0][keep].float(), last[0][keep].float()


def _batches(model, place: Hook, store: TokenStore, sequences: list[int], rows: int):
    """Pairs of about `rows` tokens; position 0 (an attention sink) is left out."""
    device = model_device(model)
    per_batch = max(1, rows // store.longest)
    for i in range(0, len(sequences), per_batch):
        ids, lengths = store.batch(sequences[i : i + per_batch])
        keep = torch.arange(ids.shape[1]) < torch.from_numpy(lengths)[:, None]
        keep[:, 0] = False
        # Behind a row's end causal attention makes the padding harmless; `keep` leaves it out.
        yield _pairs(model, place, torch.from_numpy(ids).to(device), keep.to(device))


def train_lens(
    model,
    tokenizer,
    texts: Iterable[str],
    layer: int | str | Hook,
    *,
    tokens: int = 200_000,
    rank: int | None = None,
    batch_tokens: int = 256,
    lr: float = 2e-3,
    ctx_len: int = 128,
    seed: int = 0,
    report: Callable[[int, float], None] | None = None,
) -> TunedLens:
    """argmin_{A, b} E KL( p(next token) ‖ softmax(U norm(x + A x + b)) ), x residual at `layer`.

    p is the model's own final distribution at the same position, over its whole vocabulary. Adam on
    A and b in units of each dimension's standard deviation (residuals have massive dimensions),
    learning rate falling linearly to 0, from A = b = 0, the logit lens; `tokens` in all, repeating
    the texts as often as needed. rank: A = U V of that rank (default: full). A tenth of the
    sequences is held out for `about`. report(tokens, divergence) follows every step.
    Seeded. Raises FastsaeError for a mistake in an argument or texts without tokens.
    """
    width, place = hidden_size(model), resolve_hook(layer)
    hook_module(model, place)
    for name, value, least in (("tokens", tokens, 1), ("batch_tokens", batch_tokens, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FastsaeError(f"{name}: got {value!r}, accepted is an integer of {least} or more")
    if rank is not None and (isinstance(rank, bool) or not 1 <= rank <= width):
        raise FastsaeError(f"rank: got {rank!r}, accepted is 1 to {width}, or None for a full A")
    store = TokenStore.build(tokenize(texts, tokenizer, ctx_len))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(store), generator=generator).tolist()
    held = order[: max(1, int(_HELD_OUT * len(order)))]
    fit = order[len(held) :]
    if not fit:
        raise FastsaeError("texts: too few for a lens, one sequence; give more text")
    device, head = model_device(model), _Head(model)
    sample = torch.cat([x for x, _ in _batches(model, place, store, fit[:32], 1024)])
    mean, scale = sample.mean(0), sample.std(0).clamp_min(1e-6)
    weights = _parameters(width, rank, generator, device)

    def translate(x: Tensor) -> Tensor:
        A = weights["A"] if rank is None else weights["up"] @ weights["down"]
        return x + scale * ((x - mean) / scale @ A.T + weights["b"])

    optimiser = torch.optim.Adam(weights.values(), lr=lr, betas=(0.9, 0.98))
    done = 0
    while done < tokens:
        fit = [fit[i] for i in torch.randperm(len(fit), generator=generator)]
        for x, target in _batches(model, place, store, fit, batch_tokens):
            optimiser.param_groups[0]["lr"] = lr * (1 - done / tokens)
            optimiser.zero_grad()
            loss = head.divergence(translate(x), target, gradient=True)
            optimiser.step()
            done += len(x)
            if report is not None:
                report(min(done, tokens), float(loss) / len(x))
            if done >= tokens:
                break
    with torch.no_grad():
        A = weights["A"] if rank is None else weights["up"] @ weights["down"]
        A = scale[:, None] * A / scale
        b = scale * weights["b"] - A @ mean
        before = after = count = 0.0
        for x, target in _batches(model, place, store, held, batch_tokens):
            before += float(head.divergence(x, target, gradient=False))
            after += float(head.divergence(x + x @ A.T + b, target, gradient=False))
            count += len(x)
    about = {
        "divergence_logit_lens": before / count,
        "divergence": after / count,
        "held_out_tokens": int(count),
        "tokens": done,
        "rank": rank,
        "lr": lr,
        "batch_tokens": batch_tokens,
        "seed": seed,
        "text_digest": store.digest,
    }
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    A, b = (t.detach().float().cpu().contiguous() for t in (A, b))
    return TunedLens(A, b, _name(place), name, model_fingerprint(model), about)


def _parameters(width: int, rank: int | None, generator, device) -> dict[str, Tensor]:
    """A (or up and down) and b in whitened units; all make A = 0 at the start."""
    found = {"b": torch.zeros(width)}
    if rank is None:
        found["A"] = torch.zeros(width, width)
    else:
        found["down"] = torch.randn(rank, width, generator=generator) / width**0.5
        found["up"] = torch.zeros(width, rank)
    return {name: t.to(device).requires_grad_() for name, t in found.items()}
