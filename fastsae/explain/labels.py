"""One line per feature, written and judged by a language model from its words and texts."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from fastsae.errors import FastsaeError
from fastsae.explain.chat import Cached, Chat
from fastsae.explain.examples import Example, Examples
from fastsae.explain.explanations import Explanations
from fastsae.explain.progress import Progress
from fastsae.explain.storage import replacing

FORMAT = "fastsae-labels"
VERSION = 1
VERDICTS = ("yes", "probably", "unlikely", "no")
_LONGEST = 200  # characters of a label

_LABEL = """\
A feature of a language model stands for words, and fires in texts at the token in [[brackets]].
Say in one short line what they have in common.

Words: guitar, song, band, melody, singer
Text: they played the [[song]] again and
Text: her new [[album]] was recorded in
Label: music and songs

"""
_JUDGE = """\
A feature of a language model stands for words, and fires in texts at the token in [[brackets]].
Say whether the label describes it: yes, probably, unlikely or no.

Words: guitar, song, band, melody, singer
Text: they played the [[song]] again and
Label: music and songs
Fits (yes, probably, unlikely or no): yes

Words: guitar, song, band, melody, singer
Text: they played the [[song]] again and
Label: prices of houses
Fits (yes, probably, unlikely or no): no

"""


class Label(NamedTuple):
    """What a feature is about."""

    text: str
    verdict: str | None  # one of VERDICTS; None: the model's answer was none of them
    model: str  # who said so


class Labels(dict[int, Label]):
    """{feature: Label} of the SAE whose decoder has `digest`; kept as NAME.labels.jsonl."""

    def __init__(self, digest: str, labels: dict[int, Label] | None = None):
        super().__init__(labels or {})
        self.digest = digest

    def judged(self, *verdicts: str) -> list[int]:
        """Features with one of these verdicts, ascending.

        >>> Labels("", {3: Label("music", "yes", "m"), 1: Label("?", "no", "m")}).judged("yes")
        [3]
        """
        if wrong := [v for v in verdicts if v not in VERDICTS]:
            raise FastsaeError(f"verdict: got {wrong[0]!r}, accepted are {', '.join(VERDICTS)}")
        return sorted(f for f, label in self.items() if label.verdict in verdicts)

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        header = {"format": FORMAT, "version": VERSION, "sae": self.digest}
        lines = [header] + [{"feature": f, **self[f]._asdict()} for f in sorted(self)]
        with replacing(path) as temporary:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            temporary.write_text(text, encoding="utf-8", newline="\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Labels":
        """Read what `save` wrote. Raises FastsaeError when it is missing, damaged or foreign."""
        path = Path(path)
        try:
            header, *lines = map(json.loads, path.read_text(encoding="utf-8").split("\n")[:-1])
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise FastsaeError(f"{path}: holds no labels of this fastsae")
            return cls(header["sae"], {e.pop("feature"): Label(**e) for e in lines})
        except OSError as error:
            raise FastsaeError(f"{path}: cannot be read ({error.strerror})") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, FastsaeError):
                raise
            raise FastsaeError(f"{path}: not a file of labels ({error})") from None


def label_features(
    explanations: Explanations,
    chat: Chat,
    features: Sequence[int],
    examples: Examples | None = None,
    *,
    words: int = 12,
    texts: int = 4,
    cache: str | Path | None = None,
    workers: int = 1,
    prices: tuple[float, float] | None = None,
    progress: bool = False,
) -> Labels:
    """Ask `chat` for each feature's label, then whether the label fits.

    The label is written from the best `words` words and, of up to `texts` examples, those of even
    rank; it is judged on those of odd rank, which it has not seen (on all where there is one).
    chat: `Endpoint`, `LocalModel`, or anything with their `name` and `complete`. cache: a file that
    keeps every answer, so a stopped run continues where it was. workers: requests at a time.
    prices: per million prompt and completion tokens, to show the cost beside the progress.
    Raises FastsaeError when the endpoint stays away; answers so far are in the cache.
    """
    chosen = [explanations._row(f) for f in dict.fromkeys(features)]

    def ask(chat: Cached, feature: int) -> Label:
        shown = examples[feature].examples if examples and feature in examples else []
        shown = shown[:texts]
        seen, unseen = shown[::2], shown[1::2] or shown
        evidence = describe(explanations.words(feature)[:words], seen)
        text = _one_line(chat.complete(question(_LABEL + evidence + "Label:")).text)
        if not text:
            return Label("", None, chat.name)
        evidence = describe(explanations.words(feature)[:words], unseen)
        asked = f"{_JUDGE}{evidence}Label: {text}\nFits (yes, probably, unlikely or no):"
        answer = chat.complete(question(asked), 5, VERDICTS).text
        return Label(text, first_of(VERDICTS, answer), chat.name)

    answers = ask_all(ask, chat, chosen, cache, workers, prices, progress, "label")
    return Labels(explanations.sae.digest, answers)


def ask_all(
    ask: Callable[[Cached, int], object],
    chat: Chat,
    features: Sequence[int],
    cache: str | Path | None,
    workers: int,
    prices: tuple[float, float] | None,
    progress: bool,
    title: str,
) -> dict[int, object]:
    """{feature: ask(chat, feature)}, `workers` at a time, every answer kept in `cache`."""
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise FastsaeError(f"workers: got {workers!r}, accepted is an integer of 1 or more")
    cached, found = Cached(chat, cache), {}
    with (
        Progress(title, len(features), "features", on=progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        waiting = {pool.submit(ask, cached, feature): feature for feature in features}
        try:
            for done in as_completed(waiting):
                found[waiting[done]] = done.result()
                bar.add(1, cached.cost(prices))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {feature: found[feature] for feature in features}


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def describe(words: Sequence[str], examples: Iterable[Example]) -> str:
    lines = [f"Words: {', '.join(words)}"]
    for example in examples:
        parts = list(example.tokens)
        token = parts[example.peak]
        lead = token[: len(token) - len(token.lstrip())]
        parts[example.peak] = f"{lead}[[{token.strip()}]]"
        lines.append(f"Text: {' '.join(''.join(parts).split())}")
    return "\n".join(lines) + "\n"


def first_of(options: Sequence[str], answer: str) -> str | None:
    """The option that the answer begins with, or the only one that it holds as a word.

    >>> [first_of(VERDICTS, a) for a in (" **Probably**, since", "Answer: no", "yes and no? so")]
    ['probably', 'no', 'yes']
    >>> first_of(VERDICTS, "It is yes or no") is None
    True
    """
    words = "".join(c if c.isalnum() else " " for c in answer).lower().split()
    held = [o for o in options if o.lower() in words]
    starts = [o for o in held if o.lower() == words[0]]
    return (starts or (held if len(held) == 1 else [None]))[0]


def _one_line(answer: str) -> str:
    line = next((part.strip() for part in answer.splitlines() if part.strip()), "")
    return line.removeprefix("Label:").strip().strip("\"'*").strip()[:_LONGEST]
