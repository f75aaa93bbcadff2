"""A forward in one compiled call: the same bits and counts as position by position in torch."""

import itertools

import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.ops.native import steer_tokens
from fastsae.steering import Policy, ablate, add, amplify, attach, gate, tokens
from fastsae.steering.positions import Generation, Where
from fastsae.steering.scratch import Scratch

pytest.importorskip("transformers")
D = 32


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def padded(rows: int, columns: int, dtype=torch.long) -> torch.Tensor:
    """Rows with 0, 1, 2 … columns of padding on the left, and one with a hole."""
    mask = torch.ones(rows, columns, dtype=torch.long)
    for row in range(rows):
        mask[row, : min(row, columns - 1)] = 0
    mask[-1, columns // 2] = 0
    return mask.to(dtype)


def forwards(rows: int):
    """(name, what the model is given, generation) of forwards of every kind."""
    lengths = torch.arange(rows) + 2
    told, untold = Generation(rows, 6, lengths), Generation(rows, 6, None)
    for tokens_, past in itertools.product((1, 3), (0, 5)):
        ids = torch.ones(rows, tokens_, dtype=torch.long)
        base = {"input_ids": ids, "past_key_values": Cache(past)}
        yield "no mask", base, None
        yield "no mask, no cache", {"input_ids": ids}, None
        whole = padded(rows, past + tokens_)
        for mask in (whole, whole.bool(), whole.T.contiguous().T, padded(rows, past + 9)):
            yield "mask", base | {"attention_mask": mask}, None
        yield "mask of these tokens", base | {"attention_mask": padded(rows, tokens_)}, None
        yield "float mask", base | {"attention_mask": whole.float()}, None
        place = torch.arange(past, past + tokens_).unsqueeze(0)
        for positions in (place, place.expand(rows, -1), place + torch.arange(rows).unsqueeze(1)):
            yield "ids", base | {"position_ids": positions}, None
        yield "int32 ids", base | {"position_ids": place.int()}, None
        yield "static", base | {"past_key_values": Cache(torch.tensor(past))}, None
        yield "told", base | {"attention_mask": whole}, told
        yield "untold", base | {"attention_mask": whole}, untold
    # Two sequences for each row of the prompt, as beams and num_return_sequences make them.
    half = Generation(rows // 2, 6, lengths[: rows // 2])
    yield "copies", {"attention_mask": padded(rows, 8), "past_key_values": Cache(7)}, half


POLICIES = [
    Policy(add([1, 2], 3.0)),
    None,
    Policy(ablate([3, 4, 5]), phase="generated"),
    Policy([amplify([7], 2.0), add([2], -1.0)], phase="prompt", gate=gate([6], above=0.0)),
]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first_token", [False, True])
def test_the_same_as_position_by_position(llama, make_sae, kind, first_token, monkeypatch):
    one, many = tokens.steered, []
    monkeypatch.setattr(tokens, "steered", lambda *given: many.append(one(*given)) or many[-1])
    served = set()
    with attach(llama, {0: make_sae()}, first_token=first_token) as handle:
        (point,) = handle._host.points.values()
        (site,) = point.sites
        for policies in (POLICIES, POLICIES[:1], [POLICIES[2]], POLICIES[2:]):
            handle.set(policies, strengths=[0.5 + i for i in range(len(policies))])
            for name, given, generation in forwards(len(POLICIES)):
                if len(policies) == 2 and name != "copies":
                    continue
                x = torch.randn(len(POLICIES), _tokens(given), D).to(kind)
                results = []
                for fast in (True, False):
                    scope = generation and Generation(
                        generation.batch, generation.columns, generation.lengths
                    )
                    site.table_only = fast
                    site.counts.zero_()
                    out = site.apply(x, Where(given, scope, None, Scratch()))
                    results.append((out.clone(), site.counts.clone()))
                    served |= {name} if fast and many[-1] is not None else set()
                (ours, counted), (wanted, count) = results
                assert torch.equal(ours, wanted), (name, given)
                assert torch.equal(counted, count), (name, given)
    # A clone of a length in a tensor, int32 ids and float masks go the general way.
    all_kinds = {name for name, *_ in forwards(4)}
    assert all_kinds - served <= {"float mask", "int32 ids", "static", "untold"}


def _tokens(given) -> int:
    return given["input_ids"].shape[1] if "input_ids" in given else 1


@pytest.mark.parametrize("order", ["rows", "columns", "strided"])
def test_a_residual_of_any_layout(llama, make_sae, order):
    x = torch.randn(4, 6, D)
    x = {"rows": x, "columns": x.transpose(0, 1).contiguous().transpose(0, 1), "strided": x[:, ::2]}
    x = x[order]
    with attach(llama, {0: make_sae()}) as handle:
        handle.set(POLICIES)
        (site,) = next(iter(handle._host.points.values())).sites
        out = site.apply(x, Where({}, None))
        assert torch.equal(out, site.apply(x.contiguous(), Where({}, None)))


def test_a_required_policy_is_counted_and_a_missing_length_is_asked_for(llama, make_sae):
    with attach(llama, {0: make_sae()}) as handle:
        handle.set(Policy(add(1, 2.0), required=True))
        (site,) = next(iter(handle._host.points.values())).sites
        site.apply(torch.randn(1, 2, D), Where({}, None))
        assert int(site.forwards) == 1
        ids = torch.ones(1, 2, dtype=torch.long)
        with pytest.raises(FastsaeError, match="does not tell how many tokens it holds"):
            site.apply(torch.randn(1, 2, D), Where({"past_key_values": 3, "input_ids": ids}, None))


BROKEN = {
    "x": ("x", torch.zeros(2, D)),
    "mask": ("mask", torch.ones(2, 2, dtype=torch.long)),
    "ids": ("ids", torch.zeros(3, 1, dtype=torch.long)),
    "slots": ("slots", torch.tensor([[1], [99]], dtype=torch.int32)),
    "strengths": ("strengths", torch.ones(1, 1)),
    "on_prompt": ("on_prompt", torch.ones(2, 1)),
    "lengths": ("lengths", torch.ones(3, dtype=torch.long)),
    "counts": ("counts", torch.zeros(2, 1, dtype=torch.int32)),
    "out": ("out", torch.zeros(2, 3, D, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_compiled_call_names_what_it_cannot_read(llama, make_sae, what):
    with attach(llama, {0: make_sae()}) as handle:
        handle.set([Policy(add(1, 2.0)), None])
        (site,) = next(iter(handle._host.points.values())).sites
    flags = torch.ones(2, 1, dtype=torch.bool)
    given = {
        "x": torch.randn(2, 3, D),
        "mask": None,
        "ids": None,
        "base": 0,
        "end": 3,
        "first": 1,
        "slots": torch.tensor([[1], [0]], dtype=torch.int32),
        "strengths": torch.ones(2, 1),
        "on_prompt": flags,
        "on_generated": flags,
        "lengths": None,
        "phase": 0,
        "counts": torch.zeros(2, 1, dtype=torch.long),
        "out": torch.zeros(2, 3, D),
        "table": list(site.table.buffers),
    }
    steer_tokens(*given.values())
    assert given["counts"].tolist() == [[2], [0]]
    name, broken = BROKEN[what]
    with pytest.raises(RuntimeError, match=name):
        steer_tokens(
            *(given | {name: broken, "counts": given["counts"].zero_()} | {name: broken}).values()
        )
    assert given["counts"].tolist() == [[0], [0]]
