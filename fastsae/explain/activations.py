"""Where in a text collection chosen features fire: the strongest places, and samples of values."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastsae.data import layer_activations
from fastsae.errors import FastsaeError
from fastsae.models import Hook, hidden_size, model_device, resolve_hook
from fastsae.sae import SAE


class Activation(NamedTuple):
    """One place where a feature fires; before + token + after is the text around it."""

    value: float
    document: int  # number of the text, from 0 in the order given
    position: int  # token position in the document, special tokens included
    before: str
    token: str
    after: str


class ActivationSample(NamedTuple):
    """Values of one feature over a text collection; active / tokens is its frequency."""

    values: Tensor  # [<= limit] float32, the first active values in text order
    active: int  # tokens on which the feature is active, beyond the limit too
    tokens: int  # tokens read: position 0 and padding do not count


class _Batch(NamedTuple):
    """Entries (active values of chosen features) of B documents, in text order; all on the CPU."""

    ids: Tensor  # [B, L] int64, -1 behind a document's end
    first: int  # number of the batch's first document
    tokens: int  # tokens looked at
    document: Tensor  # [E] int64, row of ids
    position: Tensor  # [E] int64
    slot: Tensor  # [E] int64, place in the list of chosen features
    value: Tensor  # [E] float32, > 0
    documents: list[str]


def top_activations(
    sae: SAE,
    model,
    tokenizer,
    texts: Iterable[str],
    features: Sequence[int],
    *,
    n: int = 5,
    layer: int | str | None = None,
    context: int = 12,
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[int, list[Activation]]:
    """For each feature f the n largest a_f over the tokens of `texts`, at most one per document.

    texts: any iterable of strings, read once, `batch_size` documents in memory at a time; of each
    the first `max_length` tokens (at most what the model has positions for). features: feature
    numbers; repeats count once. layer: where the SAE reads the model (default: its hook point);
    the model runs no further than that layer.
    context: tokens of text kept on either side. Position 0 and padding never count.

    Returns {feature: [Activation, ...]} in the order of `features`, descending; ties: the earlier
    document, then the earlier token. A feature that fires in fewer documents has fewer entries.
    Memory: n contexts per feature and one batch, whatever the number of texts.
    Raises FastsaeError for a mistake in any argument.
    """
    chosen = _chosen(sae, features)
    for name, value, least in (("n", n, 1), ("context", context, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FastsaeError(f"{name}: got {value!r}, accepted is an integer of {least} or more")
    best = _Best(len(chosen), n, context)
    for batch in _batches(sae, model, tokenizer, texts, chosen, layer, batch_size, max_length):
        best.merge(batch)
    return {f: best.entries(slot, tokenizer) for slot, f in enumerate(chosen)}


def activation_values(
    sae: SAE,
    model,
    tokenizer,
    texts: Iterable[str],
    features: Sequence[int],
    *,
    limit: int = 10_000,
    layer: int | str | None = None,
    batch_size: int = 8,
    max_length: int = 512,
) -> dict[int, ActivationSample]:
    """For each feature the values a_f > 0 over the tokens of `texts`, the first `limit` of them.

    Arguments and errors as in `top_activations`; for histograms and frequencies.
    """
    chosen = _chosen(sae, features)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise FastsaeError(f"limit: got {limit!r}, accepted is an integer of 1 or more")
    kept: list[list[Tensor]] = [[] for _ in chosen]
    active = torch.zeros(len(chosen), dtype=torch.int64)
    tokens = 0
    for batch in _batches(sae, model, tokenizer, texts, chosen, layer, batch_size, max_length):
        counts = batch.slot.bincount(minlength=len(chosen))
        by_slot = batch.value[batch.slot.sort(stable=True).indices].split(counts.tolist())
        for slot in counts.nonzero()[:, 0].tolist():
            room = limit - int(active[slot])
            if room > 0:
                kept[slot].append(by_slot[slot][:room].clone())
        active += counts
        tokens += batch.tokens
    return {
        f: ActivationSample(torch.cat([*kept[slot], torch.empty(0)]), int(active[slot]), tokens)
        for slot, f in enumerate(chosen)
    }


class _Best:
    """The n best places of each of S features, with the token ids around them."""

    def __init__(self, slots: int, n: int, context: int, *, with_values: bool = False):
        self.n, self.context = n, context
        # The feature's values on every token of a window, where they are wanted.
        self.around = torch.zeros(slots, n, 2 * context + 1) if with_values else None
        self.values = torch.zeros(slots, n)  # 0: no entry, an activation is positive
        self.documents = torch.zeros(slots, n, dtype=torch.int64)
        self.positions = torch.zeros(slots, n, dtype=torch.int64)
        self.windows = torch.full((slots, n, 2 * context + 1), -1)

    def merge(self, batch: _Batch) -> None:
        rows, slots = batch.ids.shape[0], self.values.shape[0]
        key = batch.slot * rows + batch.document
        value = torch.zeros(slots * rows).scatter_reduce_(0, key, batch.value, "amax")
        at_best = batch.value == value[key]
        position = torch.full((slots * rows,), batch.ids.shape[1])
        position.scatter_reduce_(0, key[at_best], batch.position[at_best], "amin")
        value, position = value.view(slots, rows), position.view(slots, rows)

        # Only features that a new document improves are touched; an equal value stays behind.
        s = (value.amax(1) > self.values[:, -1]).nonzero()[:, 0]
        value, position = value[s], position[s].clamp(max=batch.ids.shape[1] - 1)
        document = torch.arange(rows).expand(len(s), rows)
        padded = nnf.pad(batch.ids, (self.context, self.context), value=-1)
        windows = padded.unfold(1, 2 * self.context + 1, 1)[document, position]

        both = torch.cat([self.values[s], value], 1)
        merged, order = both.sort(dim=1, descending=True, stable=True)
        order = order[:, : self.n]
        self.values[s] = merged[:, : self.n]
        fields = [
            (self.documents, document + batch.first),
            (self.positions, position),
            (self.windows, windows),
        ]
        if self.around is not None:
            fields.append((self.around, self._values_around(batch, s, position)))
        for ours, new in fields:
            both = torch.cat([ours[s], new], 1)
            ours[s] = both[torch.arange(len(s))[:, None], order]

    def _values_around(self, batch: _Batch, slots: Tensor, position: Tensor) -> Tensor:
        """[s, rows, 2 * context + 1]: the values in the windows around `position` [s, rows]."""
        rows, length = batch.ids.shape
        key, order = ((batch.slot * rows + batch.document) * length + batch.position).sort()
        shift = torch.arange(-self.context, self.context + 1)
        at = position[:, :, None] + shift
        wanted = (slots[:, None] * rows + torch.arange(rows))[:, :, None] * length + at
        place = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        there = (key[place] == wanted) & (at >= 0) & (at < length)
        return torch.where(there, batch.value[order][place], 0.0)

    def entries(self, slot: int, tokenizer) -> list[Activation]:
        found = int((self.values[slot] > 0).sum())
        return [
            Activation(
                float(self.values[slot, i]),
                int(self.documents[slot, i]),
                int(self.positions[slot, i]),
                *_texts_around(tokenizer, self.windows[slot, i].tolist(), self.context),
            )
            for i in range(found)
        ]


def _texts_around(tokenizer, window: list[int], context: int) -> tuple[str, str, str]:
    """Text before, at and behind the middle token, cut out of one decoded text.

    Tokens decoded alone lose their spaces (Llama), so the parts are differences of decoded
    prefixes. A token that is a piece of a character (byte-level tokenizers) is shown as the whole
    character, which a prefix that ends inside it decodes to U+FFFD.
    """

    def decode(ids: list[int]) -> str:
        ids = [i for i in ids if i >= 0]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before, until, whole = (decode(window[:end]) for end in (context, context + 1, len(window)))
    if not whole.startswith(before):
        before = before.rstrip("\ufffd")
    if not whole.startswith(until):
        until = whole[: len(until.rstrip("\ufffd")) + 1]
    if not until.startswith(before):  # a decoder that rewrites what it has said
        return tuple(map(decode, (window[:context], [window[context]], window[context + 1 :])))
    token, after = until[len(before) :], whole[len(until) :]
    return before.lstrip("\ufffd"), token, after.rstrip("\ufffd")


def _chosen(sae: SAE, features: Sequence[int]) -> list[int]:
    d_sae = sae.config.d_sae
    chosen = list(dict.fromkeys(int(f) for f in features))
    if not chosen:
        raise FastsaeError("features: got none; give at least one feature number")
    bad = [f for f in chosen if not 0 <= f < d_sae]
    if bad:
        raise FastsaeError(f"features: got {bad[0]}, accepted are 0..{d_sae - 1}")
    return chosen


def _place(sae: SAE, layer: int | str | None) -> Hook:
    if layer is None and sae.config.hook_name is None:
        raise FastsaeError("layer: this SAE does not say where it reads the model; pass layer=")
    return resolve_hook(sae.config.hook_name if layer is None else layer)


@torch.no_grad()
def _batches(
    sae: SAE, model, tokenizer, texts, chosen: list[int], layer, batch_size: int, max_length: int
) -> Iterator[_Batch]:
    """The activations of the chosen features, batch after batch of documents."""
    for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise FastsaeError(f"{name}: got {value!r}, accepted is an integer of {least} or more")
    if isinstance(texts, str):
        raise FastsaeError("texts: got one string; pass a list of texts")
    if sae.config.d_in != hidden_size(model):
        raise FastsaeError(
            f"sae: reads vectors of d_in = {sae.config.d_in}, the residual stream of the model has "
            f"{hidden_size(model)}; use the model the SAE was trained on"
        )
    hook, device, inputs = _place(sae, layer), sae.W_enc.device, model_device(model)
    max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    slot_of = torch.full((sae.config.d_sae,), -1, device=device)
    slot_of[torch.tensor(chosen, device=device)] = torch.arange(len(chosen), device=device)
    source, first = iter(texts), 0
    was_training = model.training
    model.eval()
    try:
        while documents := list(islice(source, batch_size)):
            ids = _token_ids(tokenizer, documents, first, max_length)
            keep = ids >= 0
            keep[:, :1] = False
            tokens = int(keep.sum())
            if tokens:
                # Causal attention: ids behind a document's end cannot change the tokens before it.
                hidden = layer_activations(
                    model, hook, ids.clamp(min=0).to(inputs), (ids >= 0).long().to(inputs)
                )
                z = sae.encode(hidden[keep.to(hidden.device)].to(device))
                slot = slot_of[z.indices.long()]
                row, column = ((slot >= 0) & (z.values > 0)).nonzero(as_tuple=True)
                where = keep.nonzero()[row.cpu()]
                yield _Batch(
                    ids,
                    first,
                    tokens,
                    where[:, 0],
                    where[:, 1],
                    slot[row, column].cpu(),
                    z.values[row, column].float().cpu(),
                    documents,
                )
            first += len(documents)
    finally:
        model.train(was_training)


def _token_ids(tokenizer, documents: list[str], first: int, max_length: int) -> Tensor:
    """[B, L] token ids with the special tokens the tokenizer adds, -1 behind each end."""
    for number, text in enumerate(documents, first):
        if not isinstance(text, str):
            raise FastsaeError(f"texts: text {number} is a {type(text).__name__}, not a string")
    rows = tokenizer(documents, truncation=True, max_length=max_length)["input_ids"]
    rows = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
