"""fastsae explain."""

import functools
import sys

from fastsae.cli.arguments import command, load_model, model_arguments, print_json
from fastsae.cli.results import after_explain, example_arguments
from fastsae.errors import FastsaeError


def add_explain(commands) -> None:
    parser = command(
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
    example_arguments(parser)
    model_arguments(parser)


def _run_explain(args) -> None:
    from fastsae.explain import Vocabulary, explain
    from fastsae.sae import SAE

    size = args.vocabulary
    vocab = Vocabulary.default(int(size)) if size.isdecimal() else Vocabulary.from_file(size)
    temperature = _temperature(args.temperature)
    if args.top < 1:
        raise FastsaeError(f"top: got {args.top}, expected a positive integer")
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    model, tokenizer = load_model(args)
    if args.shards:
        from fastsae.explain.sharded import explain_sharded

        explain = functools.partial(explain_sharded, directory=args.shards, shard=args.shard)
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
    after_explain(args, explanations, sae, model, tokenizer)
    shown = args.features if args.features is not None else range(min(10, sae.config.d_sae))
    rows = [
        {"feature": f, "words": explanations.words(f), "scores": explanations.scores_of(f)}
        for f in shown
    ]
    if args.json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['feature']:7}  {', '.join(row['words'])}")


def _temperature(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise FastsaeError(f"temperature: got {text!r}, expected auto or a number") from None
