"""How well lists of words name features: precision, AUROC, diversity, and bootstrap intervals."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastsae.explain.vocabulary import Vocabulary

TRIVIAL_RANK, TRIVIAL_LETTERS, DOMINANT = 250, 4, 0.1
# English closed classes: determiners, pronouns, prepositions, conjunctions, auxiliaries, particles.
FUNCTION_WORDS = frozenset(
    """a about above across after again against all along also although always am among an and
    another any anybody anyone anything are aren around as at away be became because become been
    before behind being below beneath beside besides between beyond both but by can cannot could
    despite did do does doing done down during each either else enough etc even ever every everybody
    everyone everything except few for from further had has have having he hence her here hers
    herself him himself his how however if in indeed inside instead into is it its itself just least
    less like many may maybe me might mine more most much must my myself near neither never nobody
    none nor not nothing now of off often on once one ones only onto or other others otherwise ought
    our ours ourselves out outside over own per perhaps quite rather same several shall she should
    since so some somebody someone something sometimes somewhat still such than that the their
    theirs them themselves then there therefore these they this those though through throughout thus
    to together too toward towards under unless until up upon us very via was we were what whatever
    when whenever where whereas wherever whether which while who whoever whole whom whose why will
    with within without would yes yet you your yours yourself yourselves""".split()
)


class Interval(NamedTuple):
    """A mean over the n features that have the value, its 95 % bootstrap interval (None: n = 0)."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


def interval(values: Tensor, *, draws: int = 2000, seed: int = 0) -> Interval:
    """Mean of the values that are not NaN; 2.5 and 97.5 percentiles over resampled features."""
    kept = values[~values.isnan()].double().numpy()
    if not len(kept):
        return Interval(None, None, None, 0)
    rng = np.random.default_rng(seed)
    means = [kept[rng.integers(0, len(kept), len(kept))].mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(kept.mean()), float(low), float(high), len(kept))


def top_words(scores: Tensor, m: int) -> Tensor:
    """The m words of the largest score per feature [S, V] -> [S, m]; ties: the lower index.

    A score of −∞ marks a word that the method does not name: its place holds −1.
    """
    values, order = scores.sort(dim=1, descending=True, stable=True)
    return torch.where(values[:, :m] == -torch.inf, -1, order[:, :m])


def precision(words: Tensor, right: Tensor) -> Tensor:
    """Share of each feature's m named words that are right: [S, m], [S, V] bool -> [S].

    A word that is not named (−1) counts as wrong: a list shorter than m is a worse list.
    """
    hits = right.gather(1, words.clamp(min=0)) & (words >= 0)
    return hits.double().mean(1)


def auroc(scores: Tensor, right: Tensor, among: Tensor) -> Tensor:
    """P(score of a right word > score of a wrong one), ties ½, over the words of `among` [V].

    scores [S, V], right [S, V] bool; returns [S] float64, NaN where no word, or every one, is
    right. By ranks (Mann and Whitney): (Σ ranks of the right − n₁(n₁+1)/2) / (n₁ n₀).
    """
    out = torch.full((len(scores),), float("nan"), dtype=torch.float64)
    for i, (row, truth) in enumerate(zip(scores[:, among], right[:, among], strict=True)):
        n1 = int(truth.sum())
        n0 = len(truth) - n1
        if n1 and n0:
            _, place, size = row.unique(return_inverse=True, return_counts=True)
            rank = size.cumsum(0).double() - (size.double() - 1) / 2
            out[i] = (rank[place][truth].sum() - n1 * (n1 + 1) / 2) / (n1 * n0)
    return out


def trivial_words(vocab: Vocabulary) -> Tensor:
    """[V] bool: one of the 250 most frequent words, or of fewer than 4 letters.

    A vocabulary without frequencies is taken to be in order of frequency.
    """
    frequency = vocab.frequencies or tuple(range(len(vocab), 0, -1))
    order = torch.tensor(frequency, dtype=torch.float64).sort(descending=True, stable=True).indices
    out = torch.tensor([len(word) < TRIVIAL_LETTERS for word in vocab])
    out[order[:TRIVIAL_RANK]] = True
    return out


def word_use(words: Tensor, vocab: Vocabulary) -> dict[str, float | None]:
    """What kind of words a method uses, over all lists [S, m] together.

    diversity ↑: share of the vocabulary's non-trivial words that some feature names. lexical ↓:
    share of the named words that are trivial (`trivial_words`). dominance ↓: share of the distinct
    named words that more than 10 % of the features name. discourse ↑: share of the named words
    that are neither function words nor fragments (fewer than three letters); None without a list of
    function words, i.e. when the vocabulary does not look English.
    """
    trivial = trivial_words(vocab)
    named = words[words >= 0]
    uses = named.bincount(minlength=len(vocab))
    used = uses > 0
    plain = torch.tensor([len(w) >= 3 and w.lower() not in FUNCTION_WORDS for w in vocab])
    english = {"the", "and", "of"} <= set(vocab.words)
    return {
        "diversity": float((used & ~trivial).sum() / (~trivial).sum().clamp(min=1)),
        "lexical": float(trivial[named].double().mean()),
        "dominance": float((uses > DOMINANT * len(words)).sum() / used.sum().clamp(min=1)),
        "discourse": float(plain[named].double().mean()) if english else None,
    }
