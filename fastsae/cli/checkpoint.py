"""fastsae inspect, fastsae convert."""

import argparse
import json
from pathlib import Path
from typing import Any

from fastsae.cli.arguments import command, print_json
from fastsae.errors import FastsaeError


def add_inspect(commands) -> None:
    parser = command(
        commands,
        "inspect",
        _run_inspect,
        "show what an SAE checkpoint is",
        "fastsae inspect my-sae",
        json_help="print it as JSON",
    )
    _checkpoint(parser, "sae")


def add_convert(commands) -> None:
    parser = command(
        commands,
        "convert",
        _run_convert,
        "write an SAE of any known family as a SAELens or sparsify checkpoint",
        "fastsae convert gemma-scope-2b-pt-res my-sae --sae-id layer_20/width_16k/average_l0_71",
    )
    _checkpoint(parser, "source")
    _output(parser)


def _checkpoint(parser: argparse.ArgumentParser, name: str) -> None:
    """The arguments that name a checkpoint; `_options` reads them."""
    parser.add_argument(name, help="SAE folder, file or hub repository, of any known family")
    parser.add_argument("--sae-id", help="folder or file inside it")
    parser.add_argument("--revision", help="branch, tag or commit of a hub repository")
    parser.add_argument("--from-format", metavar="FAMILY", help="its family (default: by content)")
    parser.add_argument(
        "--compat", default="authors", choices=("authors", "saelens"), help="whose reading it is"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="an entry that its config lacks, such as k=50; may be repeated",
    )


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--format", default="saelens", choices=("saelens", "sparsify"))
    parser.add_argument("--dtype", default="float32", help="of the written weights")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of SAE.from_pretrained."""
    overrides: dict[str, Any] = {}
    for entry in args.set:
        name, equals, value = entry.partition("=")
        if not (name and equals):
            raise FastsaeError(f"set: got {entry!r}, expected NAME=JSON, such as k=50")
        try:
            overrides[name] = json.loads(value)
        except ValueError:
            overrides[name] = value  # text needs no quotes
    return {
        "format": args.from_format,
        "revision": args.revision,
        "compat": args.compat,
        "overrides": overrides,
    }


def _run_inspect(args: argparse.Namespace) -> None:
    from fastsae.formats.describe import as_text, describe

    found = describe(args.sae, args.sae_id, **_options(args))
    print_json(found) if args.json else print(as_text(found))


def _run_convert(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FastsaeError(f"output: {output} is not empty; name a new folder")
    from fastsae.sae import SAE

    sae = SAE.from_pretrained(args.source, args.sae_id, dtype=args.dtype, **_options(args))
    sae.save_pretrained(output, format=args.format)
    print(f"{output}: {sae.extra_repr()}, as {args.format}")
