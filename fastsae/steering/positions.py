"""Where every token of a forward stands: its absolute position, padding, prompt or generated.

A hook on the module that owns the decoder layers sees each forward's attention mask, position ids
and cache before any layer changes them; a wrapper around `generate` knows where the prompt ends.
Nothing here reads a tensor's values on the host, so it costs no synchronisation and traces into a
graph. (One exception, once per `generate` that was called without a mask: see `_prompt_lengths`.)
"""

import contextlib
import inspect
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from fastsae.errors import FastsaeError
from fastsae.steering.batching import Packed
from fastsae.steering.scratch import Scratch, no_scratch


class Generation:
    """One call of `generate`: the columns its prompt fills and, once known, each row's length.

    columns counts padding and whatever an earlier cache holds; lengths [batch] counts real tokens.
    """

    def __init__(self, batch: int, columns: int, lengths: Tensor | None):
        self.batch = batch
        self.columns = columns
        self.lengths = lengths
        self.fed = 0  # tokens so far, counted only for a cache that cannot tell its length

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> "Generation":
        """From the arguments of `generate`; a mask also covers tokens that a given cache holds."""
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        prompt = kwargs.get("inputs_embeds")
        prompt = ids if prompt is None else prompt
        mask = kwargs.get("attention_mask")
        if not isinstance(prompt, Tensor):
            return cls(1, 1, None)  # generate() without a prompt starts from one BOS token
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return cls(prompt.shape[0], prompt.shape[1], None)
        return cls(prompt.shape[0], max(prompt.shape[1], mask.shape[1]), (mask != 0).sum(1))


class Where:
    """The tokens of one forward, for every hooked layer of it: B rows, T tokens in each."""

    def __init__(
        self, given: dict, generation: Generation | None, requests=None, scratch=no_scratch
    ):
        mask, ids = given.get("attention_mask"), given.get("position_ids")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        self.packed = given.get("cu_seq_lens_q") is not None
        tokens = given.get("input_ids")
        self.input_ids = tokens if isinstance(tokens, Tensor) and tokens.dim() == 2 else None
        embeds = given.get("inputs_embeds")
        fed = embeds if isinstance(embeds, Tensor) else self.input_ids
        self.shape = None if fed is None else (fed.shape[0], fed.shape[1])
        self.requests = requests
        self.scratch = scratch
        self.visited: list = []  # the sites that have steered this forward
        self.seconds = 0.0  # that they took, when somebody wants to know
        self.inputs: list = []  # (site, what its transcoder reads), in this forward
        self.generation = generation
        self.untold = False
        cache = given.get("past_key_values")
        self.past = self._cached(given.get("cache_params") if cache is None else cache)
        self.tokens = 0
        self._positions: Tensor | None = None
        self._real: Tensor | None = None
        self._request_of: Packed | None = None

    def request_of(self, residual: Tensor) -> Packed:
        """Which request every token of a packed forward belongs to."""
        if self.requests is None:
            raise FastsaeError(
                "policies: this packed forward comes from a manager that was made before attach; "
                "attach first, then generate_batch or init_continuous_batching"
            )
        if self._request_of is None or self._request_of.rows.device != residual.device:
            self._request_of = self.requests.packed(residual.shape[1], residual.device)
        return self._request_of

    def _cached(self, cache) -> "int | Tensor | None":
        """Tokens in the cache before this forward, None without a cache or when nobody will ask.

        A static cache counts in a tensor, which it will update in place. A recurrent state has no
        length at all.
        """
        if cache is None:
            return None
        scope = self.generation
        if scope is not None and scope.lengths is not None and self.mask is None:
            if self.ids is not None:
                return None  # a static sliding cache has an int here: a recompile per token
        try:
            past = cache.get_seq_length()
        except (AttributeError, ValueError):
            self.untold = True
            return None if scope is None else scope.fed
        return past.clone() if isinstance(past, Tensor) else past

    def positions(self, residual: Tensor) -> tuple[Tensor, Tensor | None]:
        """(positions [B or 1, T], real [B, T] or None). Padding: real is False, or position 0."""
        self.tokens = residual.shape[1]
        if self._positions is None or self._positions.device != residual.device:
            self._positions, self._real = self._locate(residual.shape[1], residual.device)
        return self._positions, self._real

    def columns(self, residual: Tensor) -> "tuple[Tensor | None, Tensor | None, int, int] | None":
        """(mask, ids, base, end): the same as numbers, for an op that counts by itself.

        A token's position is its entry of ids [B or 1, T]; else base, and one more for each token
        before it in its row of mask [B, columns], whose last columns before `end` are these tokens;
        without a mask all are. None where that is not known on the host: see `_locate`.
        """
        tokens = self.tokens = residual.shape[1]
        if self.packed or isinstance(self.past, Tensor):
            return None
        if self.mask is None and self.ids is not None and self.ids.shape[1] == tokens:
            return None, self.ids, 0, tokens
        if self.mask is None:
            self._must_be_told()
            return None, None, self.past or 0, tokens
        end = self._end(tokens)
        whole = self.mask.shape[1] == tokens
        return (self.mask, None, (self.past or 0) if whole else 0, end) if end >= tokens else None

    def _end(self, tokens: int) -> int:
        """One past the mask's column of our last token."""
        columns = self.mask.shape[1]
        end = columns if self.past is None else self.past + tokens
        return end if tokens < columns and end <= columns else columns

    def _locate(self, tokens: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        past = self.past.to(device) if isinstance(self.past, Tensor) else self.past or 0
        if self.mask is None:
            if self.ids is not None and self.ids.shape[1] == tokens:
                return self.ids.to(device), None
            self._must_be_told()
            return (torch.arange(tokens, device=device) + past).unsqueeze(0), None
        columns = self.mask.shape[1]
        # With a static cache the mask can be as long as the cache: our columns follow the past.
        if isinstance(past, Tensor) and columns != tokens:
            real = (self.mask != 0).to(device)
            here = past + torch.arange(tokens, device=device)
            positions = real.long().cumsum(1) - 1
            return positions.index_select(1, here), real.index_select(1, here)
        end = columns if columns == tokens else self._end(tokens)
        mask = self.mask.to(device)
        real = self._nonzero("real", mask[:, end - tokens : end], torch.bool)
        shape = (mask.shape[0], tokens)
        if columns == tokens:
            positions = self.scratch("positions", shape, torch.int64, device)
            return torch.cumsum(real, 1, out=positions).add_(past - 1), real
        # int64, or the sum would make a copy in int64 first.
        earlier = self._nonzero("earlier", mask[:, : end - tokens + (tokens == 1)], torch.int64)
        count = self.scratch("count", (shape[0], 1), torch.int64, device)
        count = torch.sum(earlier, 1, keepdim=True, out=count)
        if tokens == 1:  # a decode step: its own column is counted already
            return count.sub_(1), real
        positions = self.scratch("positions", shape, torch.int64, device)
        return torch.cumsum(real, 1, out=positions).add_(count).sub_(1), real

    def _nonzero(self, name: str, mask: Tensor, dtype: torch.dtype) -> Tensor:
        buffer = self.scratch(name, mask.shape, dtype, mask.device)
        return (mask != 0).to(dtype) if buffer is None else torch.ne(mask, 0, out=buffer)

    def steered(self, residual: Tensor, first_token: bool) -> Tensor:
        """[B or 1, T] bool: real tokens, without each row's first one unless `first_token`."""
        positions, real = self.positions(residual)
        buffer = self.scratch("steered", positions.shape, torch.bool, positions.device)
        later = torch.ge(positions, 0 if first_token else 1, out=buffer)
        if self.packed and self.requests is not None:
            return later & self.request_of(residual).real
        return later if real is None else later.logical_and_(real)

    def generated(self, residual: Tensor, lengths: Tensor | None) -> "Tensor | bool":
        """Position ≥ prompt length, per token; lengths [B, 1] when the caller knows them.

        Else they come from `generate`. Outside it, a forward without a cache or on an empty one is
        all prompt, and tokens that follow a filled cache are generated.
        """
        if self.packed:
            return self.positions(residual)[0] >= self.request_of(residual).lengths
        if lengths is None and self.generation is None:
            return self.after_prompt()
        positions, _ = self.positions(residual)
        if lengths is None:
            lengths = self._prompt_lengths(positions, residual.shape[0]).unsqueeze(1)
        shape = (max(positions.shape[0], lengths.shape[0]), positions.shape[1])
        buffer = self.scratch("generated", shape, torch.bool, positions.device)
        return torch.ge(positions, lengths.to(positions.device), out=buffer)

    def lengths(self) -> Tensor | None:
        """[rows] of the prompts, as `generate` was told them or has worked them out since."""
        return None if self.generation is None else self.generation.lengths

    def after_prompt(self) -> bool:
        """Whether the tokens of a forward outside `generate` follow others."""
        self._must_be_told()
        return self.past is not None and self.past > 0

    def _must_be_told(self) -> None:
        if self.untold and self.generation is None:
            raise FastsaeError(
                "past_key_values: this cache does not tell how many tokens it holds; use generate, "
                "or pass attention_mask for all tokens and set prompt_lengths"
            )

    def _prompt_lengths(self, positions: Tensor, rows: int) -> Tensor:
        """[rows]: real prompt tokens of each, that is the prompt's columns less its padding."""
        scope = self.generation
        if scope.lengths is not None:
            copies = rows // scope.lengths.shape[0]
            return scope.lengths if copies == 1 else scope.lengths.repeat_interleave(copies)
        # generate() can derive a mask from the pad token by itself. Padding is on the left, so the
        # last token's position tells how many of the columns up to it are padding.
        seen = (0 if self.past is None else self.past) + positions.shape[1]
        lengths = scope.columns - (seen - (positions.amax(1) + 1))
        if not torch.compiler.is_compiling() and seen == scope.columns:
            scope.lengths = lengths
        return lengths


class Tracker:
    """Follows the forwards and the `generate` calls of one model while it is hooked."""

    def __init__(self, trunk: torch.nn.Module):
        self.points: list = []
        self.now: Where | None = None
        self.generation: Generation | None = None
        self.failed: Exception | None = None  # raised by a hook, perhaps in another thread
        self.requests = None  # of the manager that `generate_batch` uses
        self.observe: Callable[[float], None] | None = None  # told the seconds of every forward
        self.scratch = Scratch()
        self._running: int | None = None  # the thread whose forward is under way
        self._generating: dict[int, Generation] = {}  # by thread
        self._names = tuple(inspect.signature(trunk.forward).parameters)

    def enter(self, trunk, args: tuple, kwargs: dict) -> None:
        """Before the layers run: note what the hooks inside will need, if any has work to do."""
        if any(point.active for point in self.points):
            if not torch.compiler.is_compiling():
                self._claim()
            given = {**dict(zip(self._names, args, strict=False)), **kwargs}
            self.now = Where(given, self.generation, self.requests, self.scratch)

    def leave(self, trunk, args: tuple, output) -> None:
        """After the layers have run, or have raised: then output is None."""
        now, self.now = self.now, None
        if torch.compiler.is_compiling():
            for point in self.points if now is not None else ():
                point.demand(now)  # which layers a graph runs is settled when it is traced
            return
        if self._running == threading.get_ident():
            self._running = None
        if now is None or output is None:
            return
        if self.observe is not None:
            self.observe(now.seconds)
        if now.untold and self.generation is not None:
            self.generation.fed += now.tokens
        for point in self.points:
            point.demand(now)

    def _claim(self) -> None:
        """One thread at a time: positions and prompt lengths belong to the running forward."""
        me = threading.get_ident()
        if self._running not in (None, me) or any(ident != me for ident in self._generating):
            raise FastsaeError(
                "model: another thread is running this steered model; run it from one thread at a "
                "time, or batch the requests and give each row its policy"
            )
        self._running = me

    def where(self) -> Where:
        """The running forward; a layer that is called on its own is a forward without inputs."""
        return self.now if self.now is not None else Where({}, self.generation, self.requests)

    @contextlib.contextmanager
    def generating(self, args: tuple, kwargs: dict):
        me = threading.get_ident()
        outer = self._generating.get(me)
        self.generation = self._generating[me] = Generation.of(args, kwargs)
        try:
            yield
        finally:
            self._generating.pop(me)
            if outer is not None:
                self._generating[me] = outer
            self.generation = next(reversed(self._generating.values()), None)
            self.now = None
