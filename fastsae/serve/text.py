"""Tokens to text while they come, up to a stop string."""

from collections.abc import Sequence

REPLACEMENT = "\ufffd"  # what a decoder writes for the first half of a character


class TextStream:
    """feed(token) returns the text that is certain now; nothing after a stop string is ever given.

    Text is held back while it could be half a character, or the beginning of a stop string.
    """

    def __init__(self, tokenizer, prompt: Sequence[int], stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        # A few tokens of context: many decoders write a first token without its space.
        self._tokens = list(prompt[-4:])
        self._begin, self._read = 0, len(self._tokens)
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        if self.stopped:
            return ""
        self._tokens.append(int(token))
        before = self._decode(self._tokens[self._begin : self._read])
        after = self._decode(self._tokens[self._begin :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return ""
        self._begin, self._read = self._read, len(self._tokens)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """What was held back, when no more tokens will come."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._begin : self._read])
        text = self._release(self._decode(self._tokens[self._begin :])[len(before) :])
        self._read = len(self._tokens)
        held, self._held = self._held, ""
        self.text += held
        return text + held

    def _release(self, more: str) -> str:
        pending = self._held + more
        found = [at for at in (pending.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            self.text += pending[: min(found)]
            return pending[: min(found)]
        keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
        self._held = pending[len(pending) - keep :]
        self.text += pending[: len(pending) - keep]
        return pending[: len(pending) - keep]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
