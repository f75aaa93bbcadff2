"""mi_topk over parts of the features: what one process, or many, compute shard after shard.

Every result is the same bits whatever the number of threads and processes: matrix products run in
blocks of a fixed size on one thread each (a library's product of the same rows on more threads
rounds otherwise), or on AMX tiles, and parts are combined in the order of their numbers.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fastsae.ops import backend as backends
from fastsae.ops import native
from fastsae.ops.reference import _score, _topk_tile, full_precision

ROWS = 512  # features whose logits are in memory at once: 4 · ROWS · V bytes
WORD_BLOCK = 4096  # words made, split into tiles, or multiplied at once


class MIParts:
    """The two passes of `mi_topk` over one fixed set of V words.

    words: gives rows [begin, end) of the word vectors, float32 [end - begin, D] on `device`; asked
    for block by block, so that tiles (6·V·D bytes) or a float32 copy (4·V·D) are all that is kept.
    """

    def __init__(
        self,
        words: Callable[[int, int], Tensor],
        count: int,
        width: int,
        *,
        device: torch.device | str = "cpu",
    ):
        self.words, self.count, self.width = words, count, width
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        name = backends.choose("mi_topk", torch.empty(0, device=self.device)).name
        self.native = on_cpu and name == "native"
        # Made when the first product is taken: `moments` needs its memory before.
        self._tiles: Tensor | None = None
        self._can_tile = self.native and native.isa() == "amx"
        self._dense: Tensor | None = None
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads())) if on_cpu else None

    @property
    def arithmetic(self) -> str:
        """What must be equal for equal bits: "amx", "avx2", ..., "reference cpu", a GPU's name."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return native.isa() if self.native else f"reference {self.device.type}"

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean [D] of the words and Gram matrix [D, D] of the centred words, float64."""
        mean = torch.zeros(self.width, dtype=torch.float64, device=self.device)
        for begin, end in self._blocks():
            with _one_thread(self.device):
                mean += self.words(begin, end).double().sum(0)
        mean /= self.count
        gram = torch.zeros(self.width, self.width, dtype=torch.float64, device=self.device)
        edges = range(0, self.width, 256)
        for begin, end in self._blocks():
            block = self.words(begin, end).double().sub_(mean)

            def add(i: int, block=block) -> None:  # the lower triangle
                gram[i : i + 256, : i + 256].addmm_(block[:, i : i + 256].T, block[:, : i + 256])

            self._each(add, edges)
        for i in edges:
            gram[:i, i : i + 256] = gram[i : i + 256, :i].T
            square = gram[i : i + 256, i : i + 256]
            square.copy_(square.tril() + square.tril(-1).T)
        return mean, gram

    def spread(self, features: Tensor, mean: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Σ_f Σ_v (L[f, v] - L[f, ·] mean)² [] and the means over v of L[f, ·] [n], float64."""
        wide = features.double()
        parts = range(0, len(wide), 64)
        within = torch.zeros(len(parts), dtype=torch.float64, device=self.device)
        means = torch.empty(len(wide), dtype=torch.float64, device=self.device)

        def measure(i: int) -> None:
            part = wide[i : i + 64]
            within[i // 64] = torch.mm(part, gram).mul_(part).sum()
            means[i : i + 64] = (part * mean).sum(1)

        self._each(measure, parts)
        return torch.tensor(math.fsum(within.tolist()), dtype=torch.float64), means.cpu()

    def columns(self, features: Tensor, temperature: float) -> Tensor:
        """[2, V] float32 on the CPU: max_f L/T and Σ_f exp(L/T - max) over these features."""
        maximum = torch.full((self.count,), -math.inf, device=self.device)
        total = torch.zeros(self.count, device=self.device)
        tiles = self._on_tiles(features)
        buffer = None if tiles else self._buffer(len(features))
        for part in features.split(ROWS):
            if tiles:
                self._product(part, 1.0 / temperature, [maximum, total], [])
            elif self.native:
                logits = self._logits(part, buffer)
                native._leaf._mi_columns(logits, 1.0 / temperature, maximum, total)
            else:
                with _one_thread(self.device):
                    logits = self._logits(part, buffer) / temperature
                    top = torch.maximum(maximum, logits.amax(0))
                    total = total * (maximum - top).exp() + (logits - top).exp().sum(0)
                    maximum = top
        return torch.stack([maximum, total]).cpu()

    def topk(
        self,
        features: Tensor,
        column_lse: Tensor,
        n_features: int,
        top: int,
        objective: str,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """`mi_topk` of these rows of n_features; column_lse [V] from `combine`. On the CPU."""
        found, tiles = [], self._on_tiles(features)
        buffer = self._buffer(len(features))
        column = column_lse.to(self.device)
        for part in features.split(ROWS):
            if tiles:
                logits = buffer[: len(part)]
                self._product(part, 1.0 / temperature, [], [logits])
            else:
                logits = self._logits(part, buffer)
            if self.native:
                kind, scale = native._OBJECTIVES[objective], 1.0 / temperature
                log_n = math.log(max(1, n_features))
                found.append(native._leaf._mi_topk(logits, column, scale, kind, log_n, top))
            else:
                with _one_thread(self.device):
                    score = _score(logits, column, n_features, objective, temperature)
                    found.append(_topk_tile(score, top))
        scores, indices = zip(*found, strict=True)
        return torch.cat(scores).float().cpu(), torch.cat(indices).to("cpu", torch.int32)

    # --- products -----------------------------------------------------------------------------

    def _blocks(self) -> Iterator[tuple[int, int]]:
        for begin in range(0, self.count, WORD_BLOCK):
            yield begin, min(begin + WORD_BLOCK, self.count)

    def _make_tiles(self) -> Tensor | None:
        """The words split into three bf16 parts; blocks of words follow one another in tiles."""
        per_32 = 2 * -(-self.width // 32) * 3
        tiles = torch.empty(-(-self.count // 32) * per_32, 512, dtype=torch.bfloat16)
        for begin, end in self._blocks():
            block = self.words(begin, end).float()
            if not native._splittable(block):
                return None
            made = native._leaf._mi_words(block, 3)
            at = begin // 32 * per_32
            tiles[at : at + len(made)] = made
        return tiles

    def _on_tiles(self, features: Tensor) -> bool:
        if self._can_tile and self._tiles is None:
            self._tiles = self._make_tiles()
            self._can_tile = self._tiles is not None
        return self._can_tile and native._splittable(features)

    def _product(self, features: Tensor, scale: float, sums: list, logits: list) -> None:
        native._leaf._mi_product(features, self._tiles, self.count, 3, scale, sums, logits)

    def _buffer(self, rows: int) -> Tensor:
        return torch.empty(min(rows, ROWS), self.count, device=self.device)

    def _logits(self, features: Tensor, buffer: Tensor) -> Tensor:
        """⟨f, w⟩ in fp32, block of words by block."""
        if self._dense is None:
            self._dense = torch.empty(self.count, self.width, device=self.device)
            for begin, end in self._blocks():
                self._dense[begin:end] = self.words(begin, end)
        out = buffer[: len(features)]

        def multiply(begin: int) -> None:
            words = self._dense[begin : begin + WORD_BLOCK]
            out[:, begin : begin + WORD_BLOCK] = torch.mm(features, words.T)

        self._each(multiply, range(0, self.count, WORD_BLOCK))
        return out

    def _each(self, task: Callable[[int], None], items: range) -> None:
        """task(i) for every item, each on one thread of the pool; on a GPU one after another."""
        if self._pool is None:
            with full_precision(self.device):
                for i in items:
                    task(i)
            return

        def alone(i: int) -> None:
            torch.set_num_threads(1)
            with torch.no_grad():
                task(i)

        before = torch.get_num_threads()
        try:
            with full_precision(self.device):
                list(self._pool.map(alone, items))
        finally:
            torch.set_num_threads(before)  # threads that start later take over the last setting


def combine(parts: Tensor) -> Tensor:
    """log Σ_f exp(L/T) [V] float32 from `MIParts.columns` of all shards [S, 2, V], in order."""
    maximum = parts[:, 0].amax(0)
    total = torch.zeros(parts.shape[2], dtype=torch.float64)
    for top, share in parts:
        total += share.double() * (top.double() - maximum.double()).exp()
    return (maximum.double() + total.log()).float()


@contextlib.contextmanager
def _one_thread(device: torch.device):
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
