"""What several commands share: their parser, --json, the model's arguments."""

import argparse
import json

from fastsae.errors import FastsaeError


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


def vocabulary_arguments(parser) -> None:
    parser.add_argument("--vocabulary", default="5000", help="size of the default list, or a file")
    parser.add_argument(
        "--language", default="en", help="of the default list, a wordfreq code (default en)"
    )
    parser.add_argument(
        "--merge-inflections", action="store_true", help="one word of the list per stem"
    )


def vocabulary(args):
    from fastsae.explain import Vocabulary

    if args.vocabulary.isdecimal():
        return Vocabulary.default(
            int(args.vocabulary), args.language, merge_inflections=args.merge_inflections
        )
    if args.language != "en" or args.merge_inflections:
        raise FastsaeError("vocabulary: --language and --merge-inflections are of the default list")
    return Vocabulary.from_file(args.vocabulary)


def int_or_str(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
