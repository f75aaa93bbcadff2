"""Language models that answer questions: any OpenAI-compatible endpoint, or a local model."""

import copy
import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from fastsae.errors import FastsaeError

_RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
_LONGEST_WAIT = 60.0  # seconds

Messages = Sequence[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content"}]


class Reply(NamedTuple):
    """An answer and what it cost."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Chat(Protocol):
    """What labels and annotations ask."""

    name: str

    def complete(
        self, messages: Messages, max_tokens: int = 40, options: Sequence[str] = ()
    ) -> Reply:
        """The answer; one of `options` is expected where they are given."""


class Endpoint:
    """POST {base_url}/chat/completions, the protocol of OpenAI, vLLM, llama.cpp, Ollama, ...

    base_url: up to and with the version, "https://api.openai.com/v1". key_variable: environment
    variable that holds the key; unset or empty sends none. timeout: seconds of one request.
    retries: further attempts after a lost connection, a timeout, an answer that is not what the
    protocol says, or status 408, 409, 425, 429 and 5xx; they wait `wait`, 2·wait, 4·wait, ...
    seconds (at most a minute), or what Retry-After says. Any other status is an error at once.
    Temperature 0. Safe to use from several threads.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key_variable: str = "OPENAI_API_KEY",
        timeout: float = 60.0,
        retries: int = 6,
        wait: float = 1.0,
    ):
        if not base_url.startswith(("http://", "https://")):
            raise FastsaeError(f"base_url: got {base_url!r}, expected http://... or https://...")
        self.url, self.name = base_url.rstrip("/") + "/chat/completions", model
        self.timeout, self.retries, self.wait = timeout, retries, wait
        self._key_variable = key_variable

    def complete(
        self, messages: Messages, max_tokens: int = 40, options: Sequence[str] = ()
    ) -> Reply:
        body = {
            "model": self.name,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        wait = self.wait
        for attempt in range(self.retries + 1):
            reply, problem, asked = self._attempt(json.dumps(body).encode())
            if reply is not None:
                return reply
            if attempt < self.retries:
                time.sleep(min(_LONGEST_WAIT, wait if asked is None else asked))
                wait *= 2
        raise FastsaeError(
            f"{self.url}: no answer after {self.retries + 1} attempts (last: {problem}); what is "
            "done is kept, run again to continue"
        )

    def _attempt(self, body: bytes) -> tuple[Reply | None, str, float | None]:
        """(reply, problem, seconds the server asks to wait)."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self._key_variable):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return _reply(json.loads(response.read())), "", None
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode("utf-8", "replace").strip().replace("\n", " ")
            if error.code not in _RETRIED:
                hint = (
                    f"; put the key into the environment variable {self._key_variable}"
                    if error.code in (401, 403)
                    else ""
                )
                raise FastsaeError(f"{self.url}: status {error.code} ({said}){hint}") from None
            return None, f"status {error.code} ({said})", _seconds(error.headers["Retry-After"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            return None, f"malformed answer: {type(error).__name__}: {error}", None
        except (OSError, http.client.HTTPException) as error:
            return None, f"{type(error).__name__}: {error}", None


def _reply(answer: dict) -> Reply:
    text = answer["choices"][0]["message"]["content"]
    if not isinstance(text, str):
        raise TypeError(f"content is {type(text).__name__}")
    usage = answer.get("usage") or {}
    return Reply(text, int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)))


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else max(0.0, float(text))
    except ValueError:
        return None  # a date


class LocalModel:
    """A Hugging Face causal LM as a chat model: greedy; its chat template where it has one. Without
    one the answer ends with its first line that is not blank.

    Where `options` are given it answers with the one that the model finds most probable per token
    as the continuation, so that a base model, too, answers within them.
    """

    def __init__(self, model, tokenizer, name: str | None = None):
        self.model, self.tokenizer = model, tokenizer
        self.name = name or getattr(model.config, "_name_or_path", "") or type(model).__name__
        self._lock = threading.Lock()

    @torch.no_grad()
    def complete(
        self, messages: Messages, max_tokens: int = 40, options: Sequence[str] = ()
    ) -> Reply:
        with self._lock:
            ids = self._prompt(messages)
            if options:
                text, count = self._best(ids, options)
                return Reply(text, len(ids), count)
            prompt = torch.tensor([ids], device=self.model.device)
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                do_sample=False,
                stopping_criteria=None if self._chats() else [self._line_ended(len(ids))],
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            )[0, len(ids) :]
            return Reply(self.tokenizer.decode(out, skip_special_tokens=True), len(ids), len(out))

    def _chats(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def _line_ended(self, start: int):
        """A base model does not stop after its answer: it is stopped at the end of a line."""

        def ended(ids: torch.Tensor, _scores, **_options) -> torch.Tensor:
            text = self.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
            return torch.tensor([bool(text.strip()) and "\n" in text.lstrip()], device=ids.device)

        return ended

    def _prompt(self, messages: Messages) -> list[int]:
        if self._chats():
            text = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False
            )
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer("\n\n".join(m["content"] for m in messages))["input_ids"]

    def _best(self, ids: list[int], options: Sequence[str]) -> tuple[str, int]:
        lead = "" if self._chats() else " "
        # The prompt is read once; each option continues a copy of its cache.
        read = self.model(torch.tensor([ids], device=self.model.device), use_cache=True)
        cache = getattr(read, "past_key_values", None)
        first = read.logits[0, -1].float().log_softmax(-1)
        best, score, count = "", -torch.inf, 0
        for option in options:
            tail = self.tokenizer(lead + option, add_special_tokens=False)["input_ids"]
            values = [first[tail[0]]]
            if len(tail) > 1:
                start = ids if cache is None else []
                more = torch.tensor([start + tail[:-1]], device=self.model.device)
                kept = {} if cache is None else {"past_key_values": copy.deepcopy(cache)}
                rows = self.model(more, **kept).logits[0, 1 - len(tail) :].float().log_softmax(-1)
                values += rows[torch.arange(len(tail) - 1), torch.tensor(tail[1:])]
            mean = float(torch.stack(values).mean())
            if mean > score:
                best, score, count = option, mean, len(tail)
        return best, count


class Cached:
    """Keeps every answer of a chat model in a file, and gives it instead of asking again.

    path: JSON lines, appended as answers come, so a stopped run loses nothing; a last line that was
    cut short is dropped. None keeps nothing. Counts the tokens paid for now, not those of the file.
    """

    def __init__(self, chat: Chat, path: str | Path | None = None):
        self.chat, self.name, self.path = chat, chat.name, None if path is None else Path(path)
        self.prompt_tokens = self.completion_tokens = self.asked = self.from_file = 0
        self._lock, self._known = threading.Lock(), {}
        if self.path is not None and self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(self.path, "rb+") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                self._known[entry["key"]] = Reply(*entry["reply"])
            except (ValueError, KeyError, TypeError):
                raise FastsaeError(
                    f"{self.path}, line {number}: not an answer of a chat model; delete the file"
                ) from None

    def complete(
        self, messages: Messages, max_tokens: int = 40, options: Sequence[str] = ()
    ) -> Reply:
        question = json.dumps([self.name, list(messages), max_tokens, list(options)])
        key = hashlib.sha256(question.encode()).hexdigest()
        with self._lock:
            if key in self._known:
                self.from_file += 1
                return self._known[key]
        reply = self.chat.complete(messages, max_tokens, options)
        with self._lock:
            self._known[key] = reply
            self.asked += 1
            self.prompt_tokens += reply.prompt_tokens
            self.completion_tokens += reply.completion_tokens
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reply": list(reply)}) + "\n")
        return reply

    def cost(self, prices: tuple[float, float] | None) -> str:
        """Tokens so far and, with prices per million (prompt, completion) tokens, the money."""
        told = f"{self.prompt_tokens + self.completion_tokens:,} tokens"
        if prices is None:
            return told
        money = (self.prompt_tokens * prices[0] + self.completion_tokens * prices[1]) / 1e6
        return f"{told}, {money:.4f} spent"
