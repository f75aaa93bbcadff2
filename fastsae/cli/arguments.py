"""What several commands share: their parser, --json, the model's arguments."""

import argparse
import json


def command(commands, name: str, run, help: str, example: str, *, json_help: str | None = None):
    parser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    if json_help:
        parser.add_argument("--json", action="store_true", help=json_help)
    return parser


def print_json(value) -> None:
    print(json.dumps(value, indent=1))


def model_arguments(parser) -> None:
    parser.add_argument("--model", default="gemma3-270m", help="hub id, folder, or gemma3-270m")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))


def load_model(args):
    from fastsae.models import load_model

    return load_model(args.model, dtype=args.dtype, device=args.device)


def int_or_str(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
