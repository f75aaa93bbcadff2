"""The emulation itself: what is wrong in a kernel does not go by."""

import re
from pathlib import Path

import pytest
import torch

STEER = Path(__file__).parent.parent.parent.parent / "csrc" / "steer.cuh"


def _barriers() -> dict[str, int]:
    """Barriers of steer.cuh, as "function 1" for the first of a function, and their lines."""
    found, function = {}, ""
    for number, line in enumerate(STEER.read_text().splitlines(), 1):
        function = (re.search(r"(?:__device__ \w+|^   ) (\w+)\(.*{$", line) or [0, function])[1]
        if re.search(r"(__syncthreads|cluster_sync)\(\);", line):
            earlier = sum(name.split()[0] == function for name in found)
            found[f"{function} {earlier + 1}"] = number
    return found


BARRIERS = _barriers()
SPARE = {  # not needed, and why
    "activations 2": "every coefficient is next used by the thread that wrote it",
    "operation 3": "so is every column of r, and clear_sums begins with a barrier",
    "enforce 1": "as operation 3",
    "preserve 1": "as operation 3",
}


LAST = "steer_rows_kernel 2"  # before a block leaves, for the others of its cluster
NEEDED = [
    (arch, barrier)
    for arch in ("sm_80", "sm_90")
    for barrier in BARRIERS
    if barrier not in SPARE and (arch, barrier) != ("sm_80", LAST)
]


@pytest.mark.parametrize("cuda,barrier", NEEDED, indirect=["cuda"])
def test_a_missing_barrier_is_seen(cuda, demanding, barrier):
    s = demanding(17, 640)
    for order in (0, 1, 2):
        cuda.schedule(order, BARRIERS[barrier])
        with pytest.raises(RuntimeError, match=r"no barrier between|nobody wrote|which left"):
            cuda.steer_sample(s)


def test_nothing_is_seen_where_no_barrier_is_needed(cuda, demanding):
    s = demanding(17, 640)
    wanted = cuda.steer_sample(s)
    for barrier in (*SPARE, *([LAST] if cuda.name == "sm_80" else [])):
        cuda.schedule(1, BARRIERS[barrier])
        assert torch.equal(cuda.steer_sample(s), wanted)


NEVER = "these never meet: "


@pytest.mark.parametrize(
    "name,words",
    [
        ("reads_before_it_is_written", ["reads byte 128 of dynamic", "which nobody wrote"]),
        ("overwrites_what_others_read", ["thread 31 of block 0 wrote", "no barrier between"]),
        ("shuffles_order_no_memory", ["reads byte 4", "thread 1 of block 0 wrote", "no barrier"]),
        ("half_the_block_waits", [NEVER, "(__syncthreads), and", "has left"]),
        ("two_barriers_at_once", [NEVER, "(__syncthreads), and", "(__syncthreads)"]),
        ("half_the_warp_shuffles", [NEVER + "thread 0 of block 0 has left, and thread 1 of"]),
        ("masks_out_a_lane", ["not a full mask: thread 0 of block 0 waits at mistakes.cpp:"]),
        ("asks_a_lane_of_another_warp", ["no such lane"]),
        ("writes_past_its_shared_memory", ["thread 63", "outside of its block's shared memory"]),
        ("writes_past_the_tensor", ["thread 63", "writes 4 bytes that are not its own"]),
        ("loads_at_an_odd_address", ["not aligned"]),
        ("reads_of_another_block_too_early", ["reads byte 0 of dynamic", "nobody wrote"]),
        ("leaves_while_others_read", ["uses the shared memory of block 0, which left"]),
        ("one_block_leaves_the_others_waiting", [NEVER, "(cluster's sync), and", "has left"]),
    ],
)
def test_a_mistake_is_seen(builds, name, words):
    said = builds["sm_90"].mistake(name)
    assert all(word in said for word in words), said
