"""fastsae train: an option per field of TrainConfig."""

import argparse
import dataclasses
import inspect
import re
import types
import typing

from fastsae.cli.arguments import command, int_or_str, print_json


def add_train(commands) -> None:
    parser = command(
        commands,
        "train",
        _run_train,
        "train an SAE on a model's activations; continues from its checkpoint when there is one",
        "fastsae train --layer 12 --text corpus.jsonl.gz --output my-sae --epochs 4",
        json_help="print the final metrics as JSON on stdout",
    )
    from fastsae.training.config import TrainConfig

    hints, notes = typing.get_type_hints(TrainConfig), _field_notes(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        _field_argument(parser, field, hints[field.name], notes.get(field.name, ""))


def _field_notes(cls) -> dict[str, str]:
    """The comment behind every field: the fields' documentation lives once, where they are."""
    found = re.findall(r"^    (\w+): [^#\n]*# (.+)$", inspect.getsource(cls), re.MULTILINE)
    return {name: note.replace("%", "%%") for name, note in found}


def _field_argument(parser, field, hint, note: str) -> None:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next((t for t in (int, float, str) if t in options), str)
    if options == (int, str):
        kind = int_or_str
    name = "--" + field.name.replace("_", "-")
    required = field.default is dataclasses.MISSING
    if not required and field.default not in (None, (), 0, ""):
        note = f"{note} (default {field.default})".strip()
    if bool in options:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, help=note)
    elif typing.get_origin(hint) is tuple:
        parser.add_argument(name, nargs="+", help=note)
    else:
        parser.add_argument(name, type=kind, required=required, help=note)


def _run_train(args) -> None:
    from fastsae.train import train
    from fastsae.training.config import TrainConfig

    fields = [f.name for f in dataclasses.fields(TrainConfig)]
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    sae = train(TrainConfig(**given))
    if args.json:
        print_json({"output": args.output, **sae.config.metadata["metrics"]})
