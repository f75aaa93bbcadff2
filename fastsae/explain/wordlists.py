"""Frequent words of a language: wordfreq's lists, filtered, inflections merged on request."""

import unicodedata
from collections.abc import Callable, Iterator

from fastsae.errors import FastsaeError

LETTERS = ("ascii", "alphabetic")
# What snowballstemmer calls the languages of wordfreq that it can stem.
_STEMMERS = {
    "ar": "arabic", "ca": "catalan", "da": "danish", "de": "german", "el": "greek",
    "en": "english", "es": "spanish", "fi": "finnish", "fr": "french", "hu": "hungarian",
    "id": "indonesian", "it": "italian", "lt": "lithuanian", "nb": "norwegian", "nl": "dutch",
    "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sv": "swedish",
    "ta": "tamil", "tr": "turkish",
}  # fmt: skip


def languages() -> list[str]:
    """Codes of the languages that wordfreq has a list for, sorted."""
    return sorted(_wordfreq().available_languages(wordlist="best"))


def frequent_words(
    n: int, language: str, letters: str | None, merge_inflections: bool
) -> tuple[dict[str, float], str]:
    """The n most frequent words with their frequencies, and one line that says what they are."""
    wordfreq = _wordfreq()
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise FastsaeError(f"n: got {n!r}, accepted is an integer of 1 or more")
    if language not in (known := languages()):
        raise FastsaeError(
            f"language: got {language!r}, wordfreq has lists for {', '.join(known)}; "
            "write words of another language into a file: Vocabulary.from_file(path)"
        )
    if letters is None:
        letters = "ascii" if language == "en" else "alphabetic"
    if letters not in LETTERS:
        raise FastsaeError(f"letters: got {letters!r}, accepted are {', '.join(LETTERS)}")
    stem = _stemmer(language) if merge_inflections else None
    words: dict[str, float] = {}
    first: dict[str, str] = {}  # stem -> its most frequent form, which stands for it
    for word, frequency in _entries(wordfreq, language, letters):
        if len(words) == n:
            break
        form = word if stem is None else first.setdefault(stem(word), word)
        # Upper and lower case entries of one word are one word of the more frequent entry's share.
        if form == word:
            words.setdefault(word, frequency)
        else:
            words[form] += frequency
    if len(words) < n:
        raise FastsaeError(
            f"n: got {n}, wordfreq has {len(words)} words of language {language!r} and "
            f"letters {letters!r}; ask for fewer"
        )
    about = "" if letters == ("ascii" if language == "en" else "alphabetic") else f" {letters}"
    about += ", inflections merged" if merge_inflections else ""
    version = getattr(wordfreq, "__version__", None) or _version("wordfreq")
    return words, f"wordfreq {version} {language}{about}, top {n}"


def _entries(wordfreq, language: str, letters: str) -> Iterator[tuple[str, float]]:
    known = wordfreq.get_frequency_dict(language, wordlist="best")
    seen: set[str] = set()
    for entry in wordfreq.iter_wordlist(language, wordlist="best"):
        word = entry.lower()
        fits = len(word) >= 2 and all(map(_is_letter, word))
        if fits and (letters != "ascii" or word.isascii()) and word not in seen:
            seen.add(word)
            yield word, known[entry]


def _is_letter(character: str) -> bool:
    """Letters, and the marks that are part of words in Indic scripts, Thai, Arabic."""
    return character.isalpha() or unicodedata.category(character).startswith("M")


def _wordfreq():
    try:
        import wordfreq
    except ImportError:
        raise FastsaeError(
            "Vocabulary.default needs the wordfreq package: pip install wordfreq "
            "(or give your own words: Vocabulary.from_file(path))"
        ) from None
    return wordfreq


def _stemmer(language: str) -> Callable[[str], str]:
    if language not in _STEMMERS:
        raise FastsaeError(
            f"merge_inflections: no stemmer for language {language!r}; there is one for "
            f"{', '.join(_STEMMERS)}"
        )
    try:
        import snowballstemmer
    except ImportError:
        raise FastsaeError(
            "merge_inflections needs the snowballstemmer package: pip install snowballstemmer "
            "(or pip install 'fastsae-engine[stem]')"
        ) from None
    return snowballstemmer.stemmer(_STEMMERS[language]).stemWord


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"
