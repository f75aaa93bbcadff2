"""fastsae eval explanations, fastsae train-lens."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from fastsae.cli.arguments import (
    command,
    int_or_str,
    load_model,
    model_arguments,
    print_json,
    vocabulary,
    vocabulary_arguments,
)
from fastsae.errors import FastsaeError

_README_KEYS = ("precision", "auroc")


def add_eval(commands) -> None:
    parser = command(
        commands,
        "eval",
        _run_eval,
        "measure explanations: every objective and baseline against activation in held-out text",
        "fastsae eval explanations my-sae --text corpus.jsonl.gz --lens lens.safetensors "
        "--output eval.json --plot eval.svg",
        json_help="print the results as JSON",
    )
    parser.add_argument("what", choices=("explanations",), help="what to measure")
    parser.add_argument("sae", nargs="+", help="SAE folders or hub repositories of one model")
    parser.add_argument("--text", nargs="+", required=True, help="texts to count words in")
    parser.add_argument(
        "--held-out-text",
        nargs="+",
        help="texts to measure on (default: every second of --text, and those are not counted)",
    )
    parser.add_argument("--lens", nargs="+", default=[], help="files of fastsae train-lens")
    parser.add_argument(
        "--explanations",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="further explanations of the SAE to measure",
    )
    vocabulary_arguments(parser)
    parser.add_argument(
        "--window", type=int_or_str, default=32, help="tokens of a passage, or document"
    )
    parser.add_argument("--top", type=int, default=10, help="words per feature (default 10)")
    parser.add_argument("--features", type=int, default=1024, help="features measured")
    parser.add_argument("--output-features", type=int, default=128, help="of them, output side")
    parser.add_argument("--strength", type=float, default=4.0, help="of the added feature, in σ")
    parser.add_argument(
        "--ngrams",
        type=int,
        default=0,
        metavar="TEXTS",
        help="measure n-grams too, of so many of a feature's best texts (0..20, default 0: slow)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the results here (JSON)")
    parser.add_argument("--plot", help="write the plot here (.svg)")
    parser.add_argument("--markdown", help="write the table of all SAEs here (.md)")
    model_arguments(parser)


def _run_eval(args) -> None:
    from fastsae.data import texts
    from fastsae.environment import cpu_name, version_of
    from fastsae.explain import Explanations, TunedLens, evaluate
    from fastsae.explain.plots import as_markdown, as_svg, as_text
    from fastsae.formats import write_text
    from fastsae.models import resolve_hook
    from fastsae.sae import SAE

    for option in (args.output, args.plot, args.markdown):
        if option and not Path(option).resolve().parent.is_dir():
            raise FastsaeError(f"{option}: its folder does not exist; create it first")
    vocab = vocabulary(args)
    fit = list(texts(args.text))
    if args.held_out_text:
        held = list(texts(args.held_out_text))
        if both := set(fit) & set(held):
            raise FastsaeError(f"held_out_text: {len(both)} of its texts are in --text too")
    else:
        fit, held = fit[::2], fit[1::2]
    given = {}
    for entry in args.explanations:
        name, _, path = entry.partition("=")
        if not name or not path:
            raise FastsaeError(f"explanations: got {entry!r}, expected NAME=FILE")
        given[name] = Explanations.load(path)
    lenses = {resolve_hook(lens.hook): lens for lens in map(TunedLens.load, args.lens)}
    saes = {path: SAE.from_pretrained(path).to(args.device) for path in args.sae}
    model, tokenizer = load_model(args)
    results = []
    for path, sae in saes.items():
        hook = sae.config.hook_name
        if hook is None:
            raise FastsaeError(f"sae: {path} does not say where it reads the model (hook_name)")
        print(f"{path} ({hook})", file=sys.stderr)
        found = evaluate(
            sae, model, tokenizer, vocab, fit, held, lens=lenses.get(resolve_hook(hook)),
            explanations=given, window=args.window, top=args.top, features=args.features,
            output_features=args.output_features, strength=args.strength,
            ngrams=args.ngrams, seed=args.seed,
            say=lambda line: print(f"  {line}", file=sys.stderr, flush=True),
        )  # fmt: skip
        about = {"path": Path(path).name, "hook": hook, "d_sae": sae.config.d_sae}
        about |= {"k": sae.config.k, "training": sae.config.metadata.get("metrics")}
        results.append({"sae": about, **found})
        if not args.json:
            print(f"\n{path} ({hook})\n{as_text(found)}\nbest: {found['best']}\n", flush=True)
    record = {
        "command": shlex.join(["fastsae", *args.argv]),
        "commit": _commit(),
        "machine": {"cpu": cpu_name(), "fastsae": version_of("fastsae-engine")},
        "model": args.model,
        "results": results,
    }
    if args.output:
        write_text(Path(args.output), json.dumps(record, indent=1, allow_nan=False) + "\n")
    if args.plot:
        write_text(Path(args.plot), as_svg(results))
    if args.markdown:
        write_text(Path(args.markdown), as_markdown(results, _README_KEYS) + "\n")
    if args.json:
        print_json(record)


def _commit() -> str | None:
    """The commit that ran, when fastsae runs from its repository; "+" marks local changes."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty=+", "--exclude=*"],
            capture_output=True, text=True, timeout=20,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def add_train_lens(commands) -> None:
    parser = command(
        commands,
        "train-lens",
        _run_train_lens,
        "fit a tuned lens: a translator from one layer's residual to the model's output",
        "fastsae train-lens --layer 9 --text corpus.jsonl.gz --output lens-9.safetensors",
        json_help="print how well it predicts the model, as JSON",
    )
    parser.add_argument("--layer", type=int_or_str, required=True, help="layer or hook point")
    parser.add_argument("--text", nargs="+", required=True, help="texts to fit it on")
    parser.add_argument("--output", required=True, help="where to save it (.safetensors)")
    parser.add_argument("--tokens", type=int, default=200_000, help="to train on")
    parser.add_argument("--rank", type=int, help="of A (default: full)")
    parser.add_argument("--batch-tokens", type=int, default=256, help="per step (default 256)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate (default 0.002)")
    parser.add_argument("--seed", type=int, default=0)
    model_arguments(parser)


def _run_train_lens(args) -> None:
    from fastsae.data import texts
    from fastsae.explain import train_lens
    from fastsae.training.progress import Progress

    if not Path(args.output).resolve().parent.is_dir():
        raise FastsaeError(f"output: the folder of {args.output} does not exist; create it first")
    documents = texts(args.text)
    model, tokenizer = load_model(args)
    with Progress("training the lens", args.tokens) as progress:
        lens = train_lens(
            model, tokenizer, documents, args.layer, tokens=args.tokens, rank=args.rank,
            batch_tokens=args.batch_tokens, lr=args.lr, seed=args.seed,
            report=lambda at, loss: progress.to(at, divergence=f"{loss:.3f}"),
        )  # fmt: skip
    print(f"saved {lens.save(args.output)}", file=sys.stderr)
    if args.json:
        print_json(lens.about)
        return
    print(
        f"divergence from the model on held-out text, nats per token: "
        f"logit lens {lens.about['divergence_logit_lens']:.3f}, this lens "
        f"{lens.about['divergence']:.3f}"
    )
