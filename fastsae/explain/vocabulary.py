"""The words that explain features, and their vectors in the model's output space."""

import difflib
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from fastsae.errors import FastsaeError

# A space inside a token: metaspace (Gemma, Llama), byte-level BPE (GPT-2), byte fallback.
_BLANKS = ("▁", "Ġ", "<0x20>")
_ANCHOR = "a"
# How Unicode's names of letters begin in the scripts that write no space between words.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")


@dataclass(frozen=True)
class Vocabulary:
    """V distinct words, in a fixed order; a word's position is its index everywhere in fastsae.

    words: the words; none is empty or contains white space.
    frequencies: share of running text per word (0..1), or None when unknown.
    source: where the words come from, one line, kept in saved explanations.

    >>> vocab = Vocabulary(("music", "song"))
    >>> vocab.index("song"), len(vocab), "guitar" in vocab
    (1, 2, False)
    """

    words: tuple[str, ...]
    frequencies: tuple[float, ...] | None = None
    source: str = "given words"
    _position: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        if isinstance(self.words, str):
            raise FastsaeError(f"words: got the string {self.words!r}; pass a sequence of words")
        words = tuple(self.words)
        if not words:
            raise FastsaeError("words: got no word; a vocabulary needs at least one")
        for number, word in enumerate(words):
            if not isinstance(word, str) or not word or word.split() != [word]:
                raise FastsaeError(
                    f"words[{number}]: got {word!r}; "
                    "a word is a non-empty string without white space"
                )
            if self._position.setdefault(word, number) != number:
                first = self._position[word]
                raise FastsaeError(
                    f"words[{number}]: {word!r} is already words[{first}]; remove one of the two"
                )
        object.__setattr__(self, "words", words)
        if self.frequencies is not None:
            frequencies = tuple(float(f) for f in self.frequencies)
            if len(frequencies) != len(words):
                raise FastsaeError(
                    f"frequencies: got {len(frequencies)} for {len(words)} words; give one per word"
                )
            if not all(math.isfinite(f) and f >= 0 for f in frequencies):
                raise FastsaeError("frequencies: each must be a finite number, 0 or larger")
            object.__setattr__(self, "frequencies", frequencies)

    @classmethod
    def default(
        cls,
        n: int = 5000,
        language: str = "en",
        *,
        letters: str | None = None,
        merge_inflections: bool = False,
    ) -> "Vocabulary":
        """The n most frequent words of a language (usual: 1 000 to 50 000), with frequencies.

        Words are lower case, of letters only, at least two of them. language: a code of
        `Vocabulary.languages()`. letters: "ascii" (default for English) or "alphabetic", the
        letters of any script (default for other languages).
        merge_inflections: words of one Snowball stem become one, the most frequent form, with the
        sum of the frequencies of the forms met before the n-th word; needs snowballstemmer.
        Order: frequency of the form, then the order of the `wordfreq` list; the same on every
        machine that has the same packages. Raises FastsaeError for a package that is missing, and
        when the list is shorter than n.
        """
        from fastsae.explain.wordlists import frequent_words

        words, source = frequent_words(n, language, letters, merge_inflections)
        return cls(tuple(words), tuple(words.values()), source)

    @staticmethod
    def languages() -> list[str]:
        """Codes of the languages that `default` has words of."""
        from fastsae.explain.wordlists import languages

        return languages()

    @classmethod
    def from_file(cls, path: str | Path) -> "Vocabulary":
        """One word per line, UTF-8, optionally followed by white space and its frequency.

        Empty lines and what follows a `#` (at the line's start or after white space) are skipped.
        Either every word has a frequency or none. Raises FastsaeError naming the line number.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            raise FastsaeError(f"{path}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise FastsaeError(
                f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8"
            ) from None
        rows = [_parse_line(path, i, line) for i, line in enumerate(text.splitlines(), 1)]
        rows = [row for row in rows if row is not None]
        if not rows:
            raise FastsaeError(f"{path}: holds no word; write one word per line")
        seen: dict[str, int] = {}
        for number, word, _ in rows:
            if seen.setdefault(word, number) != number:
                raise FastsaeError(
                    f"{path}, line {number}: {word!r} is already on line {seen[word]}; remove one"
                )
        bare = [number for number, _, frequency in rows if frequency is None]
        if bare and len(bare) < len(rows):
            raise FastsaeError(
                f"{path}, line {bare[0]}: has no frequency while other lines do; "
                "give one to every word or to none"
            )
        frequencies = None if bare else tuple(frequency for _, _, frequency in rows)
        return cls(tuple(word for _, word, _ in rows), frequencies, f"file {path.name}")

    def to_file(self, path: str | Path) -> None:
        """Write what `from_file` reads back: the same words in the same order, and frequencies."""
        lines = [f"# {self.source}"]
        if self.frequencies is None:
            lines += self.words
        else:
            lines += [f"{w}\t{f!r}" for w, f in zip(self.words, self.frequencies, strict=True)]
        if any(word.startswith("#") for word in self.words):
            raise FastsaeError(
                "words: a word that starts with '#' cannot be written to a word file"
            )
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._position

    def index(self, word: str) -> int:
        """Position of a word, tried as given and then in lower case.

        Raises FastsaeError with the closest known words when it is not in the vocabulary.
        """
        for form in (word, word.lower()):
            if form in self._position:
                return self._position[form]
        close = _close(word.lower(), self.words)
        hint = f"; close to it: {', '.join(close)}" if close else ""
        raise FastsaeError(
            f"word: {word!r} is not among the {len(self)} words of the vocabulary "
            f"({self.source}){hint}"
        )


def _close(word: str, words: Sequence[str]) -> list[str]:
    """Up to three words like `word`, among the 200 whose letters are most like its letters.

    `difflib` alone takes 0.2 seconds for 50 000 words; a search has 0.1.
    """
    # Twice the letters that two words share, over the letters of both, bounds their similarity.
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    letters = np.frombuffer("".join(words).encode("utf-32-le", "surrogatepass"), np.uint32)
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    shared = np.zeros(len(words), np.int64)
    for letter in set(word):
        held = np.add.reduceat(letters == ord(letter), starts, dtype=np.int64)
        shared += np.minimum(held, word.count(letter))
    alike = 2 * shared / (lengths + len(word))
    nearest = (-alike).argsort(kind="stable")[:200]
    return difflib.get_close_matches(word, [words[i] for i in nearest.tolist()], n=3)


def _parse_line(path: Path, number: int, line: str) -> tuple[int, str, float | None] | None:
    fields = line.split()
    comment = next((i for i, f in enumerate(fields) if f.startswith("#")), len(fields))
    fields = fields[:comment]
    if not fields:
        return None
    if len(fields) == 1:
        return number, fields[0], None
    try:
        if len(fields) != 2:
            raise ValueError
        frequency = float(fields[1])
        if not math.isfinite(frequency) or frequency < 0:
            raise ValueError
    except ValueError:
        raise FastsaeError(
            f"{path}, line {number}: got {line.strip()!r}, accepted is a word, or a word and its "
            "frequency (a number of 0 or more)"
        ) from None
    return number, fields[0], frequency


def word_tokens(tokenizer, words: Iterable[str]) -> list[list[int]]:
    """Token ids of each word as the model meets it inside a text: those of `" " + word`.

    Words of scripts without spaces (Chinese, Japanese, Thai, ...) are tokenized without one. No
    special tokens. A tokenizer that sets the space apart (`["▁", "▁word"]`, because it puts a
    space before every text, or because no joint token exists) is asked for the word behind another
    word; a space that still stands alone is dropped. `tokenizer` is a Hugging Face tokenizer, slow
    or fast. Raises FastsaeError for words without any token or of unknown tokens only.
    """
    words = list(words)
    if not words:
        raise FastsaeError("words: got no word")

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False)["input_ids"]

    ids = [list(row) for row in encode([_in_text(word) for word in words])]
    is_blank = _blank_test(tokenizer)
    split = [i for i, row in enumerate(ids) if len(row) > 1 and is_blank(row[0])]
    if split:
        anchor = list(encode([_ANCHOR])[0])
        behind = encode([_ANCHOR + _in_text(words[i]) for i in split])
        for i, row in zip(split, behind, strict=True):
            row = list(row)
            if row[: len(anchor)] == anchor and len(row) > len(anchor):
                ids[i] = row[len(anchor) :]
            while len(ids[i]) > 1 and is_blank(ids[i][0]):
                ids[i] = ids[i][1:]
    unknown = getattr(tokenizer, "unk_token_id", None)
    bad = [w for w, row in zip(words, ids, strict=True) if all(t == unknown for t in row)]
    if bad:
        raise FastsaeError(
            f"words: the tokenizer knows no token of {len(bad)} words ({', '.join(bad[:5])}"
            f"{', ...' if len(bad) > 5 else ''}); remove them from the vocabulary"
        )
    return ids


def _in_text(word: str) -> str:
    spaced = not unicodedata.name(word[0], "").startswith(_UNSPACED)
    return f" {word}" if spaced else word


def _blank_test(tokenizer):
    cache: dict[int, bool] = {}

    def is_blank(token: int) -> bool:
        if token not in cache:
            text = str(tokenizer.convert_ids_to_tokens(token))
            for blank in _BLANKS:
                text = text.replace(blank, " ")
            cache[token] = not text.strip()
        return cache[token]

    return is_blank


@torch.no_grad()
def word_vectors(model, tokenizer, words: Vocabulary | Sequence[str]) -> Tensor:
    """word_v = mean over the tokens t of `" " + word` of U[t], U the model's output embedding.

    model: a Hugging Face causal language model; tokenizer: its tokenizer. Returns [V, D] float32 on
    the device of U. A bias of the output layer and logit soft-capping do not enter. Rows that no
    word uses are never converted, so the cost is the words' tokens, not the model's vocabulary.
    """
    from fastsae.models import output_embedding

    table = output_embedding(model)
    ids = word_tokens(tokenizer, words)
    device = table.device
    flat = torch.tensor([t for row in ids for t in row], device=device)
    if int(flat.max()) >= table.shape[0]:
        raise FastsaeError(
            f"tokenizer: gives token {int(flat.max())}, the model's output embedding has "
            f"{table.shape[0]} rows; use the tokenizer that belongs to the model"
        )
    starts = torch.tensor([0] + [len(row) for row in ids[:-1]], device=device).cumsum(0)
    used, position = flat.unique(return_inverse=True)
    return nnf.embedding_bag(position, table[used].float(), starts, mode="mean")
