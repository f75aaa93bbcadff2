"""Continuous batching: which request every token of a packed forward belongs to.

`generate_batch` packs the tokens of many requests into one row, in the scheduler's order. The
manager that it makes knows the order; the requests themselves are known by their ids.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsae.errors import FastsaeError

MOST_UNREAD = 256  # forwards that may pass without an output to deliver

_GRAPHS = (
    "continuous_batching_config: a graph replays the requests it was recorded with; steer with "
    "use_cuda_graph=False and without compile configs"
)


_OVERFLOW = (
    "steering: a token's residual came out not finite, or too large for the layers that follow; "
    "lower the strength"
)


class Packed(NamedTuple):
    """One packed forward, token by token ([T] unless said otherwise)."""

    rows: Tensor  # int64, the row of `set` that the token's request has; padding: 0
    real: Tensor  # bool, False for padding
    lengths: Tensor  # int64, prompt tokens of the token's request
    request: Tensor  # int64, which of `names` the token belongs to; padding: their number
    names: list[str]  # ids of the requests in the forward
    tally: Tensor  # [names + 1, 3] int64, tokens: at position 0, steered, overflowed

    def note(self, first: Tensor, steered: Tensor, overflowed: Tensor) -> None:
        """Counts tokens, bool [T] each, for their requests."""
        counted = torch.stack([first & self.real, steered, overflowed], 1).long()
        self.tally.index_add_(0, self.request, counted)


class Requests:
    """The requests of one manager: the row of `set` and the prompt length of each id."""

    def __init__(self, manager, host, kept: bool):
        self.manager, self.host = manager, host
        self.rows: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.next = 0  # the row of the next request that has no name of its own
        self.failed: set[str] = set()  # requests of which a token could not be steered
        # Steered tokens among those whose keys and values a request has now: a preempted request
        # is computed again from position 0, and counted again from 0.
        self.steered: dict[str, int] = {}
        self._unread: list[Packed] = []  # forwards whose tally nobody has looked at
        # The policies that the shared blocks may hold; a manager kept from before attach has none.
        self._began_with: tuple | None = () if kept else None
        self._add = manager.add_request
        manager.add_request = self.add
        self._deliver = manager.output_router.deliver_batch
        manager.output_router.deliver_batch = self.deliver

    def add(self, input_ids, request_id=None, **more):
        """`manager.add_request`: the n-th request has the n-th row, unless `set` named requests."""
        if request_id is not None:
            self.forget(request_id)
            self.lengths[request_id] = len(input_ids)  # it may get a policy while it runs
        try:
            self._refuse_shared_blocks()
            if self.host.steering():
                request_id = self._admit(input_ids, request_id)
        except FastsaeError as error:
            self.host.tracker.failed = error  # generate_batch only logs what is raised here
            raise
        return self._add(input_ids, request_id, **more)

    def forget(self, request_id: str) -> None:
        """A request that has ended; its manager lives on."""
        self.lengths.pop(request_id, None)
        self.rows.pop(request_id, None)
        self.failed.discard(request_id)
        self.steered.pop(request_id, None)

    def deliver(self, outputs) -> None:
        """The router's `deliver_batch`: requests that steering broke deliver an error, no text.

        Every output gets an attribute `steered`: the tokens that were, over all places, of those
        that its last token was computed from. Waits for the device, which the tokens to deliver
        have waited for already.
        """
        self._look()
        for output in outputs:
            name = output.request_id.partition("__child#")[0]
            output.steered = self.steered.get(name, 0)
            if name in self.failed:
                output.error, output.generated_tokens = _OVERFLOW, []
                if output.is_finished():
                    output.status = type(output.status).FAILED
        self._deliver(outputs)

    def _look(self) -> None:
        for packed in self._unread:
            counts = packed.tally.tolist()[: len(packed.names)]
            for name, (first, steered, overflowed) in zip(packed.names, counts, strict=True):
                if name not in self.lengths:
                    continue  # it has left
                self.steered[name] = steered + (0 if first else self.steered.get(name, 0))
                if overflowed:
                    self.failed.add(name)
        self._unread.clear()

    def _admit(self, input_ids, request_id: str | None) -> str:
        self._refuse_graphs()
        if self.host.requests is None:
            given = self.host.rows_set()
            if self.next >= given > 1:
                raise FastsaeError(
                    f"policies: {given} were set, but there are more requests; set one policy (or "
                    "None) per request, or a single one for all"
                )
            request_id = f"request-{self.next}" if request_id is None else request_id
            self.forget(request_id)  # another one may have had the name
            self.rows[request_id] = 0 if given == 1 else self.next
            self.next += 1
        else:
            self._named(request_id)
        self.lengths[request_id] = len(input_ids)
        return request_id

    def _named(self, request_id: str | None) -> int:
        if request_id not in self.host.requests:
            raise FastsaeError(
                f"request_id: {request_id!r} has no policy; set policies with requests= that names "
                "it (None as its policy leaves it unsteered)"
            )
        return self.host.requests.index(request_id)

    def _refuse_shared_blocks(self) -> None:
        config, now = self.manager.continuous_batching_config, self.host.signature()
        self._began_with = now if self._began_with is None else self._began_with
        if not config.allow_block_sharing:
            return
        if now != self._began_with or self.host.mixed():
            raise FastsaeError(
                "continuous_batching_config: requests with different policies, strengths or phases "
                "must not share cache blocks, which hold steered activations; pass "
                "ContinuousBatchingConfig(allow_block_sharing=False), and a new manager if one is "
                "kept"
            )

    def _refuse_graphs(self) -> None:
        config = self.manager.continuous_batching_config
        graphs = any(config.cuda_graph_booleans) and self.manager.model.device.type == "cuda"
        compiled = (config.varlen_compile_config, config.decode_compile_config)
        if graphs or any(each is not None for each in compiled):
            raise FastsaeError(_GRAPHS)

    def packed(self, tokens: int, device: torch.device) -> Packed:
        """The running forward of `tokens` tokens."""
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise FastsaeError(_GRAPHS)
        io = self.manager.batch_processor.inputs_and_outputs
        if hasattr(io, "io_pairs"):
            io = io.io_pairs[io.current_pair].host_io
        rows, real, lengths, request, names = [], [], [], [], []
        for future in io.requests_in_batch:
            name, count = future.state.request_id.partition("__child#")[0], future.query_length
            request += [len(names)] * count
            names.append(name)
            if name.startswith("__warmup_"):  # the manager's own rehearsal, before any request
                rows += [0] * count
                real += [False] * count
                lengths += [0] * count
                continue
            if name not in self.lengths:
                raise FastsaeError(
                    f"policies: request {name!r} began before they were set; set them first"
                )
            row = self.rows[name] if self.host.requests is None else self._named(name)
            rows += [row] * count
            real += [True] * count
            lengths += [self.lengths[name]] * count
        pad = [0] * (tokens - len(rows))
        packed = Packed(
            torch.tensor(rows + pad, device=device),
            torch.tensor(real + [False] * len(pad), device=device),
            torch.tensor(lengths + pad, device=device),
            torch.tensor(request + [len(names)] * len(pad), device=device),
            names,
            torch.zeros(len(names) + 1, 3, dtype=torch.int64, device=device),
        )
        if len(self._unread) == MOST_UNREAD:
            self._look()
        self._unread.append(packed)
        return packed
