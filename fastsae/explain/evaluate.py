"""Measure explanations on text that made none of them, and on what the model then says."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.explain.activations import _batches, _Best, _place
from fastsae.explain.baselines import ngram_scores
from fastsae.explain.corpus import _WORD, corpus_counts, count_batches
from fastsae.explain.counts import CorpusCounts
from fastsae.explain.effect import output_effect
from fastsae.explain.explanations import Explanations
from fastsae.explain.lens import TunedLens
from fastsae.explain.mi import feature_vectors
from fastsae.explain.rank import auroc, interval, precision, top_words, word_use
from fastsae.explain.vocabulary import Vocabulary, word_vectors
from fastsae.ops.mi import logit_std
from fastsae.sae import SAE

# A word is right when the feature is active on its occurrences this many times as often as on all.
LIFT = {"word": 5.0, "passage": 2.0}
LEAST_OCCURRENCES = 2  # in the held-out text; rarer words are no evidence and count as wrong
LEAST_ACTIVE = 20  # word occurrences on which a feature is active, in both texts, to be measured
ONE_WORD, CROWDED = 0.1, 0.9  # what makes a discourse feature, see discourse_features
_TILE = 1024
_CONTEXTS, _CONTEXT_TOKENS = 20, 12
_PROMPTS, _PROMPT_TOKENS = 8, 24


class Observed(NamedTuple):
    """What a text collection says about every feature and word."""

    word: CorpusCounts  # every word a passage
    passage: CorpusCounts
    best: _Best | None  # the strongest contexts of each feature


def observe(
    sae: SAE, model, tokenizer, texts: Iterable[str], vocab: Vocabulary, window: int | str, *,
    contexts: bool, batch_size: int = 8, max_length: int = 512,
) -> Observed:  # fmt: skip
    """One pass of the model over `texts`."""
    everything = list(range(sae.config.d_sae))
    if not contexts:
        found = corpus_counts(
            sae, model, tokenizer, texts, vocab, ("word", window),
            batch_size=batch_size, max_length=max_length,
        )  # fmt: skip
        return Observed(found["word"], found[window], None)
    best = _Best(len(everything), _CONTEXTS, _CONTEXT_TOKENS)

    def watched():
        for batch in _batches(
            sae, model, tokenizer, texts, everything, None, batch_size, max_length
        ):
            best.merge(batch)
            yield batch

    found = count_batches(watched(), sae, model, tokenizer, vocab, ("word", window))
    return Observed(found["word"], found[window], best)


def logit_scores(features: Tensor, words: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """The four corpus-free objectives for some features and every word: name -> [S, V].

    T = std of all logits, as in `explain`; normalised over all F features, by tiles of them.
    """
    temperature = logit_std(features, words)
    over_features = torch.full((len(words),), -torch.inf)
    for tile in features.split(_TILE):
        part = (tile @ words.T / temperature).logsumexp(0)
        over_features = torch.logaddexp(over_features, part)
    logits = features[rows] @ words.T
    p_word = (logits / temperature).softmax(1)
    log_p_feature = logits / temperature - over_features
    log_f = torch.log(torch.tensor(float(len(features))))
    return {
        "logit": logits,
        "pmi": log_p_feature,
        "mi": p_word * (log_p_feature + log_f),
        "paper": p_word * log_p_feature,
    }


def context_scores(
    best: _Best, counts: CorpusCounts, tokenizer, vocab: Vocabulary, rows: Tensor
) -> Tensor:
    """Words of the top-activating contexts: n(contexts with v) · log(passages / passages with v).

    [S, V]; −∞ where v is in none of the contexts: this baseline names only what it has read.
    """
    rarity = (counts.passages / counts.word.clamp(min=1).double()).log().float()
    out = torch.full((len(rows), len(vocab)), -torch.inf)
    position = vocab._position
    for i, feature in enumerate(rows.tolist()):
        uses: dict[int, int] = {}
        for at in best.entries(feature, tokenizer):
            forms = {m.group() for m in _WORD.finditer(at.before + at.token + at.after)}
            found = {position.get(form, position.get(form.lower(), -1)) for form in forms}
            for v in found - {-1}:
                uses[v] = uses.get(v, 0) + 1
        for v, n in uses.items():
            out[i, v] = n * rarity[v]
    return out


def given_scores(ex: Explanations, sae: SAE, vocab: Vocabulary, rows: Tensor) -> Tensor:
    """The scores that explanations keep, −∞ elsewhere: [S, V]."""
    ex.check(sae)
    missing = [word for word in ex.vocab if word not in vocab]
    if missing:
        raise FastsaeError(
            f"explanations: {len(missing)} of their words are not in the evaluation's vocabulary "
            f"({', '.join(missing[:5])}); evaluate with the vocabulary they were made with"
        )
    place = torch.tensor([vocab._position[word] for word in ex.vocab])
    out = torch.full((len(rows), len(vocab)), -torch.inf)
    return out.scatter_(1, place[ex.indices[rows].long()], ex.scores[rows])


@dataclass(frozen=True)
class Truth:
    """What the held-out text says: right [S, V] bool; tested [V] bool, words seen often enough."""

    right: Tensor
    tested: Tensor

    @property
    def chance(self) -> Tensor:
        """[S]: the precision of words drawn at random from the vocabulary."""
        return self.right.double().mean(1)

    @classmethod
    def of(cls, counts: CorpusCounts, rows: Tensor, lift: float) -> "Truth":
        """v is right for f when n_fv / n_v ≥ lift · n_f / N, with n_fv ≥ 1 and n_v ≥ 2."""
        joint = counts.dense(rows).double()
        tested = counts.word >= LEAST_OCCURRENCES
        rate = joint / counts.word.clamp(min=1)
        base = counts.feature[rows].double()[:, None] / counts.passages
        return cls((joint > 0) & (rate >= lift * base) & tested, tested)


def discourse_features(counts: Observed, rows: Tensor) -> Tensor:
    """[S] bool: features of a topic or style rather than of certain words, by the fit text.

    The most frequent word among a feature's active word occurrences makes up at most a tenth of
    them, and they crowd into at most nine tenths of the passages they would fill at random.
    """
    joint = counts.word.dense(rows).double()
    active = counts.word.feature[rows].double().clamp(min=1)
    cells = counts.passage.passages
    at_random = cells * (1 - (1 - 1 / cells) ** active)
    crowded = counts.passage.feature[rows].double() <= CROWDED * at_random
    return (joint.amax(1) <= ONE_WORD * active) & crowded


def evaluate(
    sae: SAE,
    model,
    tokenizer,
    vocab: Vocabulary,
    fit_texts: Iterable[str],
    held_out_texts: Sequence[str],
    *,
    lens: TunedLens | None = None,
    explanations: Mapping[str, Explanations] | None = None,
    window: int | str = 32,
    top: int = 10,
    features: int = 1024,
    output_features: int = 128,
    strength: float = 4.0,
    ngrams: int = 0,
    seed: int = 0,
    batch_size: int = 8,
    max_length: int = 512,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Every objective and baseline against real activation in `held_out_texts`, as plain data.

    fit_texts give the corpus objectives their counts and "top texts" its contexts; nothing else is
    fitted here. Measured are `features` features drawn (by `seed`) among those active on at least
    20 word occurrences in both texts; `output_features` of them for the output side.

    precision: share of the `top` words that are right, i.e. seen twice or more in the held-out text
    with the feature active on their occurrences 5 times as often as on all words. auroc: right
    above wrong words, among the words seen. discourse_precision: the same precision, on the
    `discourse_features` only, by passages of `window`: right is a word in whose passages the
    feature is active twice as often as in all. output: rise of log p of the words when the feature
    is added, over that of random words (`output_effect`); output_other: the same words under the
    other features. The kind of words: `word_use`. Intervals: bootstrap over features, 95 %.
    explanations: name -> further Explanations to measure, of the words they keep. ngrams: measure
    the words of the n-grams in so many of a feature's best texts, too (`ngram_scores`, at most 20;
    0: not): the model runs some ten times for each.
    Raises FastsaeError for a mistake in an argument, or too little text.
    """
    for name, value in (("top", top), ("features", features), ("output_features", output_features)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FastsaeError(f"{name}: got {value!r}, accepted is an integer of 1 or more")
    if isinstance(ngrams, bool) or not isinstance(ngrams, int) or not 0 <= ngrams <= _CONTEXTS:
        raise FastsaeError(f"ngrams: got {ngrams!r}, accepted is an integer of 0..{_CONTEXTS}")
    if top > len(vocab):
        raise FastsaeError(f"top: got {top}, the vocabulary has {len(vocab)} words")
    hook = _place(sae, None)
    if lens is not None:
        lens.check(model, hook)
    sizes = {"batch_size": batch_size, "max_length": max_length}
    say("reading the fit text")
    fit = observe(sae, model, tokenizer, fit_texts, vocab, window, contexts=True, **sizes)
    say("reading the held-out text")
    held = observe(sae, model, tokenizer, held_out_texts, vocab, window, contexts=False, **sizes)
    usable = (fit.word.feature >= LEAST_ACTIVE) & (held.word.feature >= LEAST_ACTIVE)
    rows = usable.nonzero()[:, 0]
    if not len(rows):
        raise FastsaeError(
            f"texts: no feature is active on {LEAST_ACTIVE} words of both texts; give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)[:features]]
    say(f"scoring {len(rows)} of {int(usable.sum())} usable features")
    methods = _methods(sae, model, tokenizer, vocab, fit, rows, lens, explanations or {}, ngrams)
    prompts = _prompts(tokenizer, held_out_texts)
    chosen = rows[:output_features]
    say(f"adding {len(chosen)} features to {len(prompts)} prompts")
    effect, norm = output_effect(
        sae, model, tokenizer, vocab, chosen, prompts, hook, strength=strength
    )
    truth = Truth.of(held.word, rows, LIFT["word"])
    topical = discourse_features(fit, rows)
    passages = Truth.of(held.passage, rows[topical], LIFT["passage"])
    say("measuring")
    table = {
        name: _measure(scores, top, vocab, truth, passages, topical, effect)
        for name, scores in methods.items()
    }
    free = [n for n in table if n.split(" + ")[0] in ("mi", "pmi", "logit")]
    return {
        "settings": {
            "top": top, "window": window, "strength_sigma": strength, "added_norm": norm,
            "ngrams": ngrams, "seed": seed, "lift": LIFT, "least_occurrences": LEAST_OCCURRENCES,
            "least_active": LEAST_ACTIVE, "prompts": len(prompts),
            "vocabulary": vocab.source, "lens": None if lens is None else lens.about,
        },
        "texts": {
            name: {"tokens": seen.word.tokens, "words": seen.word.passages}
            for name, seen in (("fit", fit), ("held_out", held))
        },
        "features": {
            "usable": int(usable.sum()), "measured": len(rows), "discourse": int(topical.sum()),
            "output": len(chosen),
        },
        "chance": {
            "precision": interval(truth.chance)._asdict(),
            "discourse_precision": interval(passages.chance)._asdict(),
        },
        "methods": table,
        "best": max(table, key=lambda n: table[n]["precision"]["mean"]),
        "best_without_texts": max(free, key=lambda n: table[n]["precision"]["mean"]),
    }  # fmt: skip


def _methods(
    sae, model, tokenizer, vocab, fit: Observed, rows, lens, given, ngrams: int
) -> dict[str, Tensor]:
    """name -> [S, V] float32 scores, in the order of the table."""
    words = word_vectors(model, tokenizer, vocab).cpu()
    out: dict[str, Tensor] = {}
    for suffix, translator in (("", None), (" + lens", lens and lens.directions)):
        if suffix and translator is None:
            continue
        features = feature_vectors(sae, model, translator=translator, device="cpu")
        found = logit_scores(features, words, rows)
        out |= {name + suffix: scores for name, scores in found.items()}
    out["top texts"] = context_scores(fit.best, fit.passage, tokenizer, vocab, rows)
    if ngrams:
        out["n-grams"] = ngram_scores(sae, model, tokenizer, fit.best, vocab, rows, ngrams)
    for counts in (fit.passage, fit.word):
        out[f"corpus-mi, {_window_name(counts.window)}"] = counts.scores(rows).float()
    out |= {name: given_scores(ex, sae, vocab, rows) for name, ex in given.items()}
    return out


def _window_name(window: int | str) -> str:
    return f"{window} tokens" if isinstance(window, int) else window


def _prompts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The beginnings of the first held-out texts that are long enough."""
    ids = (tokenizer(text)["input_ids"][:_PROMPT_TOKENS] for text in texts)
    found = list(islice((row for row in ids if len(row) == _PROMPT_TOKENS), _PROMPTS))
    if not found:
        raise FastsaeError(f"texts: no held-out text has {_PROMPT_TOKENS} tokens; give longer ones")
    return found


def _measure(
    scores: Tensor, top: int, vocab, truth: Truth, passages: Truth, topical: Tensor, effect: Tensor
) -> dict[str, Any]:
    words = top_words(scores, top)
    # The mean over random words is taken exactly, over all of them.
    raised = effect - effect.mean(1, keepdim=True)
    named = words[: len(effect)]
    weight = (named >= 0).double()
    size = weight.sum(1)
    own = (raised.double().gather(1, named.clamp(min=0)) * weight).sum(1) / size
    everyone = (raised.double().mean(0)[named.clamp(min=0)] * weight).sum(1) / size
    n = len(effect)
    other = (everyone * n - own) / (n - 1) if n > 1 else own * float("nan")
    return {
        "precision": interval(precision(words, truth.right))._asdict(),
        "auroc": interval(auroc(scores, truth.right, truth.tested))._asdict(),
        "discourse_precision": interval(precision(words[topical], passages.right))._asdict(),
        "output": interval(own)._asdict(),
        "output_other": interval(other)._asdict(),
        **word_use(words, vocab),
    }
