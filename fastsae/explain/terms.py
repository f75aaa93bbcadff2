"""Which of many texts hold a word: an inverted index."""

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np

# Runs of letters and digits; each other sign that a query can hold, by itself.
_PART = re.compile(r"[^\W_]+|[^\s\w,.;:!?\"()]|_")


class TermIndex:
    """Texts, numbered from 0, by the parts of their words; `of` answers in milliseconds.

    A text holds a term where the term stands in it, in any case, with neither a letter nor a digit
    on either side. 4 bytes per part and text that has it; the texts themselves are not kept.
    """

    def __init__(self, texts: Iterable[str]):
        lists: dict[str, array] = defaultdict(lambda: array("i"))
        for number, text in enumerate(texts):
            for part in set(_PART.findall(text.lower())):
                lists[part].append(number)
        self._lists = dict(lists)

    def of(self, terms: Sequence[str], text: Callable[[int], str]) -> Iterable[int]:
        """The texts that hold all terms, ascending; text(number) gives one of them again."""
        terms = [term.lower() for term in terms]
        parts = [_PART.findall(term) for term in terms]
        wanted = {part for each in parts for part in each}
        if not wanted or not wanted <= self._lists.keys():
            return
        lists = sorted((np.frombuffer(self._lists[p], np.int32) for p in wanted), key=len)
        found = lists[0]
        for other in lists[1:]:
            place = np.searchsorted(other, found).clip(max=len(other) - 1)
            found = found[other[place] == found]
        # A term of one run of letters is held where the run is; others must stand as written.
        unsure = [t for t, p in zip(terms, parts, strict=True) if [t] != p or not t.isalnum()]
        for number in found.tolist():
            if not unsure or all(_holds(text(number), term) for term in unsure):
                yield number


def _holds(text: str, term: str) -> bool:
    text, at = text.lower(), -1
    while (at := text.find(term, at + 1)) >= 0:
        end = at + len(term)
        if not (text[max(0, at - 1) : at].isalnum() or text[end : end + 1].isalnum()):
            return True
    return False
