"""Policies as values: what is accepted, what an error says, files and digests."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastsae.errors import FastsaeError
from fastsae.steering.policy import (
    OPERATIONS,
    Policy,
    ablate,
    add,
    amplify,
    calibrate,
    enforce,
    gate,
)

EVERYTHING = Policy(
    [
        amplify([12, 99], 4.0),
        amplify([1, 2], [0.5, -1], active="sae"),
        calibrate(7, 2.5, mode="floor", unit="max"),
        ablate([3]),
        add((4, 5), 1, unit="mean"),
        enforce([6, 8], 1.5),
    ],
    phase="generated",
    gate=gate([1, 2], above=0.2),
    norm="preserve",
    required=True,
    name="calm",
    version="1.2",
)


def spelled(**changes):
    return {"operations": [{"op": "amplify", "features": [12, 99], "alpha": 4.0}]} | changes


def test_scalars_lists_arrays_and_tensors_mean_the_same():
    expected = amplify([3, 4], [2.0, 2.0])
    for features in ((3, 4), range(3, 5), np.array([3, 4]), torch.tensor([3, 4])):
        for alpha in (2, 2.0, np.float32(2), torch.tensor(2.0), [2, 2.0], torch.full((2,), 2.0)):
            assert amplify(features, alpha) == expected
    assert ablate(np.int64(3)) == ablate(torch.tensor(3)) == ablate([3])
    assert Policy(expected) == Policy([expected]) == Policy((expected,))


def test_values_are_immutable_and_hashable():
    with pytest.raises(AttributeError):
        EVERYTHING.phase = "all"
    with pytest.raises(AttributeError):
        EVERYTHING.operations[0].alpha = (1.0,)
    assert len({EVERYTHING, Policy.from_dict(EVERYTHING.to_dict())}) == 1


def test_equality_and_digest_go_by_content():
    assert Policy(amplify([1, 2], 3)) == Policy(amplify([1, 2], [3.0, 3.0]))
    assert Policy(add(1, -0.0)).digest == Policy(add(1, 0.0)).digest
    different = [
        Policy(amplify([1, 2], 3)),
        Policy(amplify([2, 1], 3)),
        Policy(amplify([1, 2], 3, active="sae")),
        Policy(amplify([1, 2], 3), phase="prompt"),
        Policy(amplify([1, 2], 3), gate=gate(1)),
        Policy(amplify([1, 2], 3), norm="preserve"),
        Policy(amplify([1, 2], 3), required=True),
        Policy(amplify([1, 2], 3), name="a"),
        Policy(amplify([1, 2], 3), name="a", version="2"),
        Policy([amplify([1, 2], 3), ablate(1)]),
    ]
    assert len({policy.digest for policy in different}) == len(set(different)) == len(different)
    assert all(len(policy.digest) == 64 for policy in different)


def test_the_digest_is_the_same_in_every_process():
    # Policies are compared across servers and releases: a changed digest is a broken contract.
    assert Policy(amplify([12, 99], 4.0), name="calm", version=1).digest == (
        "63f706398b6d1c7a2d1be1d2f492898cdbe7678e31939a086859810a8c5cd749"
    )


def test_the_label_is_what_requests_call_it():
    assert EVERYTHING.label == "calm@1.2"
    assert Policy(ablate(1), name="calm").label == "calm"
    assert Policy(ablate(1)).label == Policy(ablate(1)).digest[:12]
    assert Policy(ablate(1), version=3).version == "3"


def test_dictionaries_round_trip():
    document = EVERYTHING.to_dict()
    assert document["operations"][0] == {
        "op": "amplify",
        "features": [12, 99],
        "alpha": 4.0,
        "active": "relu",
    }
    assert document["operations"][1]["alpha"] == [0.5, -1.0]
    assert Policy.from_dict(document) == EVERYTHING
    assert Policy.from_dict(json.loads(json.dumps(document))).digest == EVERYTHING.digest
    assert {each["op"] for each in document["operations"]} == set(OPERATIONS)


def test_the_documented_file_format(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(
        '{"name": "calm", "version": "3", "operations": [{"op": "amplify", "features": [12, 99],'
        ' "alpha": 4.0}], "phase": "generated", "gate": {"features": [7], "above": 0.2},'
        ' "norm": "preserve", "required": true}'
    )
    expected = Policy(
        amplify([12, 99], 4.0),
        name="calm",
        version="3",
        phase="generated",
        gate=gate(7, 0.2),
        norm="preserve",
        required=True,
    )
    assert Policy.from_file(path) == expected
    path.write_text(json.dumps(expected.to_dict()))
    assert Policy.from_file(str(path)) == expected


def test_a_file_with_a_list_gives_a_list(tmp_path):
    path = tmp_path / "policies.json"
    path.write_text(json.dumps([EVERYTHING.to_dict(), spelled()]))
    assert Policy.from_file(path) == [EVERYTHING, Policy(amplify([12, 99], 4.0))]


def test_yaml(tmp_path):
    pytest.importorskip("yaml")
    path = tmp_path / "policy.yaml"
    path.write_text(
        "name: calm\nversion: 3\noperations:\n  - op: ablate\n    features: 4\n"
        "  - {op: add, features: [1, 2], strength: [1, 2.5]}\ngate: {features: [7]}\n"
    )
    expected = Policy([ablate(4), add([1, 2], [1, 2.5])], name="calm", version="3", gate=gate(7))
    assert Policy.from_file(path) == expected
    for text, message in (
        ("operations: [{op: ablate, features: 4}]\nphase: all\nphase: prompt\n", "phase: given 2"),
        ("operations: [", "not YAML"),
        ("- operations: [{op: ablate, features: 4}]\n- {operations: []}\n", r"\[1\].operations"),
        ("version: 1.0\noperations: [{op: ablate, features: 4}]\n", "quoted"),
        ("operations: !!python/object/apply:os.getcwd []\n", "not YAML"),
    ):
        path.write_text(text)
        with pytest.raises(FastsaeError, match=rf"policy.yaml: .*{message}"):
            Policy.from_file(path)


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("p.json", '{"operations": [', "not JSON"),
        ("p.json", '{"operations": [], "operations": []}', "operations: given 2 times"),
        ("p.json", '[{"operations": [{"op": "add", "features": 1, "strength": NaN}]}]', "finite"),
        ("p.json", "3", "expected a policy with the keys"),
        ("p.txt", "{}", "expected a .json, .yaml or .yml file"),
        ("p.json", None, "cannot read the policy file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(FastsaeError) as error:
        Policy.from_file(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


@pytest.mark.parametrize(
    "build,message",
    [
        (lambda: amplify(12, "x"), "alpha: expected a finite number, got 'x'"),
        (lambda: amplify(12, True), "alpha: expected a finite number"),
        (lambda: amplify([1, 2], [1.0, float("inf")]), r"alpha\[1\]: expected a finite number"),
        (lambda: amplify([1, 2], [1.0]), "alpha: got 1 numbers for 2 features"),
        (lambda: amplify([1, 2], torch.ones(2, 2)), r"alpha\[0\]: expected a finite number"),
        (lambda: amplify(1, 2.0, active="topk"), "active: expected one of 'relu', 'sae'"),
        (lambda: amplify([], 1.0), "features: expected an index or a list"),
        (lambda: amplify("12", 1.0), "features: expected an index or a list"),
        (lambda: ablate(True), "features: expected an index"),
        (lambda: ablate([1.0]), "features: expected indices ≥ 0, got 1.0"),
        (lambda: ablate([1, -2]), "features: expected indices ≥ 0, got -2"),
        (lambda: ablate([4, 5, 4]), "features: 4 is listed 2 times"),
        (lambda: calibrate(1, 1.0, mode="clamp"), "mode: expected one of 'set', 'floor'"),
        (lambda: calibrate(1, 1.0, unit="std"), "unit: expected one of 'raw', 'max', 'mean'"),
        (lambda: add(1, None), "strength: expected a finite number, got None"),
        (lambda: enforce(1, 0.0), "magnitude: expected a number above 0"),
        (lambda: enforce([1, 2], [1.0, 2.0]), "magnitude: expected a finite number"),
        (lambda: gate([1], above="x"), "above: expected a finite number"),
        (lambda: Policy([]), "operations: expected one or more operations"),
        (lambda: Policy([ablate(1), "x"]), r"operations\[1\]: expected an operation"),
        (lambda: Policy(ablate(1), phase="decode"), "phase: expected one of 'all', 'prompt'"),
        (lambda: Policy(ablate(1), norm="l2"), "norm: expected one of null, 'preserve'"),
        (lambda: Policy(ablate(1), gate=[1]), "gate: expected fastsae.gate"),
        (lambda: Policy(ablate(1), required=1), "required: expected true or false"),
        (lambda: Policy(ablate(1), name="a@b"), "name: expected text without '@'"),
        (lambda: Policy(ablate(1), name=""), "name: expected text"),
        (lambda: Policy(ablate(1), version=1.5), "version: expected text"),
    ],
)
def test_mistakes_name_the_field(build, message):
    with pytest.raises(FastsaeError, match=rf"^{message}"):
        build()


@pytest.mark.parametrize(
    "document,message",
    [
        ({}, "operations: missing in policy"),
        (3, "expected a policy with the keys operations, phase"),
        (spelled(ops=1), "unknown key 'ops' in policy; accepted: operations, phase, gate, norm"),
        (spelled(operations={}), "operations: expected a list"),
        (spelled(operations=[3]), r"operations\[0\].op: expected one of amplify, calibrate"),
        (spelled(operations=[{"op": "clamp"}]), r"operations\[0\].op: expected one of .*'clamp'"),
        (
            spelled(operations=[{"op": "ablate", "features": 1}, {"op": "add", "features": 1}]),
            r"operations\[1\].strength: missing in add",
        ),
        (
            spelled(operations=[{"op": "add", "features": 1, "strength": 1, "alpha": 2}]),
            r"operations\[0\]: unknown key 'alpha' in add; accepted: op, features, strength, unit",
        ),
        (
            spelled(
                operations=[
                    {"op": "ablate", "features": 1},
                    {"op": "amplify", "features": 1, "alpha": "x"},
                ]
            ),
            r"operations\[1\].alpha: expected a finite number, got 'x'",
        ),
        (spelled(gate=[1]), "gate: expected a gate with the keys features, above"),
        (spelled(gate={"features": 1, "over": 2}), "gate: unknown key 'over' in gate"),
        (spelled(gate={"features": 1, "above": "x"}), "gate.above: expected a finite number"),
        (spelled(phase="later"), "phase: expected one of"),
    ],
)
def test_mistakes_in_a_document_name_the_place(document, message):
    with pytest.raises(FastsaeError, match=rf"^{message}"):
        Policy.from_dict(document)


def test_json_policies_need_no_yaml(tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(spelled()))
    code = (
        "import sys; from fastsae.steering.policy import Policy; "
        f"Policy.from_file({str(path)!r}); print('yaml' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
