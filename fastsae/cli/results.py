"""fastsae search, fastsae export: explanations and what lies beside them."""

import sys
import time
from pathlib import Path

from fastsae.cli.arguments import command, print_json
from fastsae.errors import FastsaeError


def add_search(commands) -> None:
    parser = command(
        commands,
        "search",
        _run_search,
        "find features by words",
        'fastsae search words.safetensors "music song" --top 5',
        json_help="print [{feature, score, matched, words, label, text}]",
    )
    parser.add_argument("explanations", help="what `fastsae explain --output` wrote")
    parser.add_argument("query", help="one or more words")
    parser.add_argument("--top", type=int, default=10, help="features to list (default 10)")
    parser.add_argument("--alive-only", action="store_true", help="leave out dead features")


def _run_search(args) -> None:
    from fastsae.explain.finder import Finder

    finder = Finder.load(args.explanations)
    start = time.perf_counter()
    hits = finder.search(args.query, args.top, alive_only=args.alive_only)
    spent = time.perf_counter() - start
    if args.json:
        print_json([hit._asdict() for hit in hits])
        return
    for hit in hits:
        score = f"{hit.score:9.4f}" if hit.score is not None else f"{'in ' + hit.matched:>9}"
        label = f"  {hit.label}:" if hit.label else ""
        print(f"{hit.feature:7}  {score}{label}  {', '.join(hit.words[:10])}")
        if hit.text:
            print(f"{'':18}  {hit.text}")
    if not hits:
        print("no feature is explained by these words", file=sys.stderr)
    print(f"{len(hits)} features in {1000 * spent:.1f} ms", file=sys.stderr)


def add_export(commands) -> None:
    parser = command(
        commands,
        "export",
        _run_export,
        "write explanations, with the examples, labels and annotations beside them, as a web page "
        "(.html), JSON lines (.jsonl), a table (.parquet) or Neuronpedia's JSON (a folder)",
        "fastsae export words.safetensors page.html",
    )
    parser.add_argument("explanations", help="what `fastsae explain --output` wrote")
    parser.add_argument("output", help="*.html, *.jsonl, *.parquet, or with --neuronpedia a folder")
    parser.add_argument("--neuronpedia", action="store_true", help="write Neuronpedia's JSON")
    parser.add_argument("--features", type=int, nargs="+", help="only these")


def parts(path: str | Path) -> dict:
    """The examples, labels and annotations that lie beside explanations."""
    from fastsae.explain.annotate import Annotations
    from fastsae.explain.examples import Examples
    from fastsae.explain.finder import companion
    from fastsae.explain.labels import Labels

    kinds = (
        ("examples", "examples.jsonl", Examples),
        ("labels", "labels.jsonl", Labels),
        ("annotations", "annotations.json", Annotations),
    )
    files = [(name, companion(path, kind), read) for name, kind, read in kinds]
    return {name: read.load(file) for name, file, read in files if file.exists()}


def _run_export(args) -> None:
    from fastsae.explain import Explanations
    from fastsae.explain.export import write_jsonl, write_neuronpedia, write_parquet
    from fastsae.explain.report import write_html

    explanations, known = Explanations.load(args.explanations), parts(args.explanations)
    if args.neuronpedia:
        if "examples" not in known:
            raise FastsaeError(
                "neuronpedia: needs examples; run fastsae explain SAE --output "
                f"{args.explanations} --text CORPUS"
            )
        files = write_neuronpedia(
            explanations, args.output, known["examples"], features=args.features
        )
        print(f"saved {len(files)} files in {args.output}", file=sys.stderr)
        return
    writers = {".html": write_html, ".jsonl": write_jsonl, ".parquet": write_parquet}
    writer = writers.get(Path(args.output).suffix)
    if writer is None:
        raise FastsaeError(
            f"output: got {args.output!r}, accepted are *.html, *.jsonl, *.parquet, or a folder "
            "with --neuronpedia"
        )
    saved = writer(explanations, args.output, features=args.features, **known)
    print(f"saved {saved}", file=sys.stderr)


def example_arguments(parser) -> None:
    """Options of `fastsae explain` for what comes after the words."""
    parser.add_argument(
        "--text",
        nargs="+",
        help="to count in, and to find examples in for --output and --html",
    )
    parser.add_argument("--examples", type=int, default=3, help="texts per feature (default 3)")
    parser.add_argument("--html", help="write a page to browse, with the examples, to this file")
    parser.add_argument("--shards", help="folder for shards: a stopped run continues")
    parser.add_argument("--shard", type=int, default=2048, help="features per shard (default 2048)")


def after_explain(args, explanations, sae, model, tokenizer, examples=None) -> None:
    """Examples (collected here where counting the texts has not) and the page."""
    if args.text and (args.output or args.html):
        from fastsae.data import texts
        from fastsae.explain import collect_examples
        from fastsae.explain.finder import companion

        if examples is None:
            examples = collect_examples(
                sae, model, tokenizer, list(texts(args.text)), n=args.examples, progress=True
            )
        if args.output:
            saved = examples.save(companion(args.output, "examples.jsonl"))
            print(f"saved {saved}", file=sys.stderr)
    if args.html:
        from fastsae.explain.report import write_html

        known = parts(args.output) if args.output else {}
        page = write_html(explanations, args.html, **known | {"examples": examples})
        print(f"saved {page}", file=sys.stderr)
