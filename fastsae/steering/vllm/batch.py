"""Which rows of vLLM's next forward belong to which request: one view for both model runners."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple


class Span(NamedTuple):
    """Consecutive rows of the flattened batch."""

    request: str
    begin: int  # first row
    tokens: int
    position: int  # absolute position of the first row's token


class Started(NamedTuple):
    """A request the runner has not seen, or sees again after it had dropped it."""

    request: str
    extra_args: dict[str, Any] | None
    prompt_tokens: int


class BatchView(NamedTuple):
    finished: Iterable[str]
    started: list[Started]
    spans: Callable[[], Iterable[Span]]  # walked only when some request is steered


def started(scheduler_output) -> list[Started]:
    """New requests as the scheduler sends them; after a preemption the V2 runner gets them again.

    Their prompt length is that of the prompt: what the V2 runner calls the prefill then includes
    tokens that were generated.
    """
    found = []
    for new in scheduler_output.scheduled_new_reqs:
        params = new.sampling_params
        prompt = new.prompt_token_ids if new.prompt_token_ids is not None else new.prompt_embeds
        extra = None if params is None else params.extra_args
        found.append(Started(new.req_id, extra, len(prompt)))
    return found


def of_v1(runner, scheduler_output) -> BatchView:
    """After `_update_states` of vllm.v1.worker.gpu_model_runner, which has put rows in order."""

    def spans():
        batch, begin = runner.input_batch, 0
        scheduled = scheduler_output.num_scheduled_tokens
        positions = batch.num_computed_tokens_cpu[: len(batch.req_ids)].tolist()
        for request, position in zip(batch.req_ids, positions, strict=True):
            tokens = scheduled.get(request, 0)
            yield Span(request, begin, tokens, position)
            begin += tokens

    return BatchView(scheduler_output.finished_req_ids, started(scheduler_output), spans)


def of_v2(scheduler_output, input_batch) -> BatchView:
    """From the InputBatch that `prepare_inputs` of vllm.v1.worker.gpu.model_runner returns.

    What finished or was preempted is told by `finish_requests`, which runs before.
    """

    def spans():
        count = len(input_batch.req_ids)
        starts = input_batch.query_start_loc_np[: count + 1].tolist()
        positions = input_batch.num_computed_tokens_np[:count].tolist()
        for i, request in enumerate(input_batch.req_ids):
            yield Span(request, starts[i], starts[i + 1] - starts[i], positions[i])

    return BatchView((), started(scheduler_output), spans)
