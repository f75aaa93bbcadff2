"""The command line: arguments in, one function call, text or JSON out. `fastsae COMMAND --help`."""

import argparse
import dataclasses
import inspect
import json
import re
import sys
import types
import typing

from fastsae import __version__
from fastsae.errors import FastsaeError


def main(argv: list[str] | None = None) -> int:
    """Run one command. A user's mistake is one line on stderr and exit code 2, no traceback."""
    args = _parser().parse_args(argv)
    from fastsae.environment import keep_freed_memory

    keep_freed_memory()
    try:
        args.run(args)
    except FastsaeError as error:
        print(f"fastsae {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"fastsae {args.command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, not the usage of every option before it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastsae", description="Explain and steer language models through sparse autoencoders."
    )
    parser.add_argument("--version", action="version", version=f"fastsae {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for add in (_demo, _train, _explain, _search, _generate, _inspect, _convert, _env):
        add(commands)
    return parser


def _command(commands, name: str, run, help: str, example: str, *, json_help: str | None = None):
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


def _print_json(value) -> None:
    print(json.dumps(value, indent=1))


def _model_arguments(parser) -> None:
    parser.add_argument("--model", default="gemma3-270m", help="hub id, folder, or gemma3-270m")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32", "float16"))


def _load_model(args):
    from fastsae.models import load_model

    return load_model(args.model, dtype=args.dtype, device=args.device)


# --- demo ----------------------------------------------------------------------------------------


def _demo(commands) -> None:
    parser = _command(
        commands,
        "demo",
        _run_demo,
        "explain and steer Gemma 3 270M on this machine; writes a report",
        "fastsae demo --output demo-report",
        json_help="print the figures as JSON on stdout (progress goes to stderr)",
    )
    parser.add_argument("--output", default="demo-report", help="folder of the report")
    parser.add_argument("--sae", help="another SAE folder (default: the shipped one)")
    parser.add_argument("--topics", help="another file of topics, prompts and settings (JSON)")
    parser.add_argument("--seed", type=int, default=0, help="of every sampled token (default 0)")


def _run_demo(args) -> None:
    from fastsae.demo.run import run

    given = {name: getattr(args, name) for name in ("sae", "topics") if getattr(args, name)}
    result = run(args.output, seed=args.seed, as_json=args.json, **given)
    if args.json:
        _print_json(result)


# --- train ---------------------------------------------------------------------------------------


def _train(commands) -> None:
    parser = _command(
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
        kind = _int_or_str
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


def _int_or_str(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _run_train(args) -> None:
    from fastsae.train import train
    from fastsae.training.config import TrainConfig

    fields = [f.name for f in dataclasses.fields(TrainConfig)]
    given = {name: getattr(args, name) for name in fields if getattr(args, name) is not None}
    sae = train(TrainConfig(**given))
    if args.json:
        _print_json({"output": args.output, **sae.config.metadata["metrics"]})


# --- explain, search -----------------------------------------------------------------------------


def _explain(commands) -> None:
    parser = _command(
        commands,
        "explain",
        _run_explain,
        "name every feature by the words that share the most mutual information with it",
        "fastsae explain my-sae --output words.safetensors --features 7 12",
        json_help="print the listed features as JSON",
    )
    parser.add_argument("sae", help="SAE folder or hub repository")
    parser.add_argument("--sae-id", help="folder inside the repository")
    parser.add_argument("--output", help="save all explanations here (.safetensors)")
    parser.add_argument("--vocabulary", default="5000", help="size of the default list, or a file")
    parser.add_argument("--objective", default="mi", choices=("mi", "pmi", "paper", "logit"))
    parser.add_argument(
        "--temperature", default="auto", help="auto (std of the logits) or a number"
    )
    parser.add_argument("--top", type=int, default=20, help="words kept per feature (default 20)")
    parser.add_argument("--features", type=int, nargs="+", help="print these features")
    _model_arguments(parser)


def _run_explain(args) -> None:
    from fastsae.explain import Vocabulary, explain
    from fastsae.sae import SAE

    size = args.vocabulary
    vocab = Vocabulary.default(int(size)) if size.isdecimal() else Vocabulary.from_file(size)
    temperature = _temperature(args.temperature)
    if args.top < 1:
        raise FastsaeError(f"top: got {args.top}, expected a positive integer")
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    model, tokenizer = _load_model(args)
    explanations = explain(
        sae,
        model,
        tokenizer,
        vocab,
        objective=args.objective,
        top=args.top,
        temperature=temperature,
    )
    if args.output:
        saved = explanations.save(args.output)
        print(f"saved {saved}", file=sys.stderr)
    shown = args.features if args.features is not None else range(min(10, sae.config.d_sae))
    rows = [
        {"feature": f, "words": explanations.words(f), "scores": explanations.scores_of(f)}
        for f in shown
    ]
    if args.json:
        _print_json(rows)
        return
    for row in rows:
        print(f"{row['feature']:7}  {', '.join(row['words'])}")


def _temperature(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise FastsaeError(f"temperature: got {text!r}, expected auto or a number") from None


def _search(commands) -> None:
    parser = _command(
        commands,
        "search",
        _run_search,
        "find features by words",
        'fastsae search words.safetensors "music song" --top 5',
        json_help="print [{feature, score, words}]",
    )
    parser.add_argument("explanations", help="what `fastsae explain --output` wrote")
    parser.add_argument("query", help="one or more words of the vocabulary")
    parser.add_argument("--top", type=int, default=10, help="features to list (default 10)")
    parser.add_argument("--alive-only", action="store_true", help="leave out dead features")


def _run_search(args) -> None:
    from fastsae.explain import Explanations

    explanations = Explanations.load(args.explanations)
    rows = [
        {"feature": feature, "score": score, "words": explanations.words(feature)}
        for feature, score in explanations.search(
            args.query, top=args.top, alive_only=args.alive_only
        )
    ]
    if args.json:
        _print_json(rows)
        return
    for row in rows:
        print(f"{row['feature']:7}  {row['score']:9.4f}  {', '.join(row['words'][:10])}")
    if not rows:
        print("no feature is explained by these words", file=sys.stderr)


# --- generate ------------------------------------------------------------------------------------


def _generate(commands) -> None:
    parser = _command(
        commands,
        "generate",
        _run_generate,
        "generate text, unsteered and steered, from the same prompt and random numbers",
        'fastsae generate my-sae --prompt "I went to the" --add 12 99 --strength 2 --unit max',
        json_help="print {prompt, base, steered}",
    )
    parser.add_argument("sae", help="SAE folder or hub repository")
    parser.add_argument("--sae-id", help="folder inside the repository")
    parser.add_argument("--prompt", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--policy", help="policy file (JSON or YAML)")
    what.add_argument("--add", type=int, nargs="+", metavar="F", help="add these features")
    what.add_argument("--amplify", type=int, nargs="+", metavar="F", help="amplify these features")
    what.add_argument("--ablate", type=int, nargs="+", metavar="F", help="remove these features")
    parser.add_argument(
        "--strength", type=float, help="of --add (in --unit) or --amplify (alpha); default 1"
    )
    parser.add_argument(
        "--unit", default="max", choices=("raw", "max", "mean"), help="of --add (default max)"
    )
    parser.add_argument(
        "--layer", type=_int_or_str, help="layer or hook point (default: the SAE's own)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--greedy", action="store_true", help="do not sample")
    parser.add_argument("--seed", type=int, default=0)
    _model_arguments(parser)


def _run_generate(args) -> None:
    from fastsae.sae import SAE
    from fastsae.steering.compare import compare

    policy = _policy(args)
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    model, tokenizer = _load_model(args)
    base, steered = compare(
        model,
        tokenizer,
        sae.to(args.device),
        policy,
        args.prompt,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        sample=not args.greedy,
        layer=args.layer,
    )
    if args.json:
        _print_json({"prompt": args.prompt, "base": base, "steered": steered})
        return
    print(f"base     {args.prompt}{base}\n\nsteered  {args.prompt}{steered}")


def _policy(args):
    from fastsae.steering import Policy, ablate, add, amplify

    if args.policy:
        policy = Policy.from_file(args.policy)
        if isinstance(policy, list):
            raise FastsaeError(f"policy: {args.policy} holds {len(policy)} policies, expected one")
        return policy
    strength = 1.0 if args.strength is None else args.strength
    if args.add:
        return Policy([add(args.add, strength, unit=args.unit)])
    if args.amplify:
        return Policy([amplify(args.amplify, strength)])
    if args.strength is not None:
        raise FastsaeError(
            "strength: --ablate removes features whole; use --amplify F --strength -0.5"
        )
    return Policy([ablate(args.ablate)])


# --- inspect, convert, env -----------------------------------------------------------------------


def _inspect(commands) -> None:
    from fastsae.formats.commands import add_checkpoint, run_inspect

    parser = _command(
        commands,
        "inspect",
        run_inspect,
        "show what an SAE checkpoint is",
        "fastsae inspect my-sae",
        json_help="print it as JSON",
    )
    add_checkpoint(parser, "sae")


def _convert(commands) -> None:
    from fastsae.formats.commands import add_checkpoint, add_output, run_convert

    parser = _command(
        commands,
        "convert",
        run_convert,
        "write an SAE of any known family as a SAELens or sparsify checkpoint",
        "fastsae convert gemma-scope-2b-pt-res my-sae --sae-id layer_20/width_16k/average_l0_71",
    )
    add_checkpoint(parser, "source")
    add_output(parser)


def _env(commands) -> None:
    _command(
        commands,
        "env",
        _run_env,
        "show versions, hardware, the extension, and which backend serves each op and why",
        "fastsae env",
        json_help="print it as JSON",
    )


def _run_env(args) -> None:
    from fastsae.environment import as_text, describe

    found = describe()
    _print_json(found) if args.json else print(as_text(found))


if __name__ == "__main__":
    sys.exit(main())
