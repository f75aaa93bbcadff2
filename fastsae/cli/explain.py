"""fastsae explain."""

import sys

from fastsae.cli.arguments import (
    command,
    int_or_str,
    load_model,
    model_arguments,
    print_json,
    vocabulary,
    vocabulary_arguments,
)
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
    vocabulary_arguments(parser)
    parser.add_argument(
        "--objective",
        choices=("corpus-mi", "pmi", "mi", "logit", "paper"),
        help="default: corpus-mi with --text or --counts (and no --shards), else pmi",
    )
    parser.add_argument(
        "--window", type=int_or_str, help="passages of the texts: word (default), document, tokens"
    )
    parser.add_argument("--counts", nargs="+", help="counts saved before, of parts of the texts")
    parser.add_argument("--save-counts", help="save the counts of --text here (.safetensors)")
    parser.add_argument("--lens", help="tuned lens of the SAE's layer, from fastsae train-lens")
    parser.add_argument(
        "--temperature", default="auto", help="auto (std of the logits) or a number"
    )
    parser.add_argument("--top", type=int, default=20, help="words kept per feature (default 20)")
    parser.add_argument("--features", type=int, nargs="+", help="print these features")
    parser.add_argument(
        "--ngrams",
        type=int,
        default=0,
        metavar="TEXTS",
        help="print the n-grams of so many best texts of --text, for the features printed",
    )
    example_arguments(parser)
    model_arguments(parser)


def _run_explain(args) -> None:
    from fastsae.explain import CorpusCounts, TunedLens, explain
    from fastsae.sae import SAE

    temperature = _temperature(args.temperature)
    if args.top < 1:
        raise FastsaeError(f"top: got {args.top}, expected a positive integer")
    texts_given = bool(args.text or args.counts) and not args.shards
    objective = args.objective or ("corpus-mi" if texts_given else "pmi")
    from_texts = objective == "corpus-mi"
    if args.counts and (args.text or args.window is not None or args.save_counts):
        raise FastsaeError("counts: --text, --window and --save-counts make counts; leave them out")
    if not (args.text and from_texts) and (args.window is not None or args.save_counts):
        raise FastsaeError("text: --window and --save-counts need --text and corpus-mi")
    if args.ngrams and not args.text:
        raise FastsaeError("ngrams: --ngrams finds them in texts; give --text")
    if from_texts and args.shards:
        raise FastsaeError("shards: corpus-mi counts in texts and has none; leave --shards out")
    counts = examples = None
    if args.counts:
        counts = CorpusCounts.merge([CorpusCounts.load(path) for path in args.counts])
    vocab = vocabulary(args) if counts is None else counts.vocab
    lens = TunedLens.load(args.lens) if args.lens else None
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    model, tokenizer = load_model(args)
    sae = sae.to(args.device)
    if from_texts and args.text:
        counts, examples = _counts(args, sae, model, tokenizer, vocab)
    how = {"temperature": temperature, "counts": counts, "lens": lens}
    if args.shards:
        from fastsae.explain.sharded import explain_sharded

        if lens is not None:
            lens.check(model, sae.config.hook_name)
        explain, how = (
            explain_sharded,
            {
                "temperature": temperature,
                "translator": None if lens is None else lens.directions,
                "directory": args.shards,
                "shard": args.shard,
            },
        )
    explanations = explain(
        sae,
        model,
        tokenizer,
        vocab,
        objective=objective,
        top=args.top,
        **how,
    )
    if args.output:
        saved = explanations.save(args.output)
        print(f"saved {saved}", file=sys.stderr)
    after_explain(args, explanations, sae, model, tokenizer, examples)
    shown = args.features if args.features is not None else range(min(10, sae.config.d_sae))
    rows = [
        {"feature": f, "words": explanations.words(f), "scores": explanations.scores_of(f)}
        for f in shown
    ]
    if args.ngrams:
        found = _ngrams(args, sae, model, tokenizer, list(shown))
        for row in rows:
            row["ngrams"] = [g._asdict() | {"text": str(g)} for g in found[row["feature"]]]
    if args.json:
        print_json(rows)
        return
    for row in rows:
        print(f"{row['feature']:7}  {', '.join(row['words'])}")
        if row.get("ngrams"):
            print(f"{'':7}  n-grams: {' | '.join(g['text'].strip() for g in row['ngrams'])}")


def _ngrams(args, sae, model, tokenizer, features: list[int]):
    from fastsae.data import texts
    from fastsae.explain import ngrams

    return ngrams(sae, model, tokenizer, texts(args.text), features, n=args.ngrams)


def _counts(args, sae, model, tokenizer, vocab):
    """Counts of the texts and, where a file of them is wanted, examples by the same pass."""
    from fastsae.data import texts
    from fastsae.explain import corpus_counts, counts_and_examples

    window, found = args.window or "word", list(texts(args.text))
    given, examples = (sae, model, tokenizer, found, vocab, (window,)), None
    if args.output or args.html:
        counts, examples = counts_and_examples(*given, n=args.examples, progress=True)
    else:
        counts = corpus_counts(*given)
    counts = counts[window]
    print(f"counted {counts.passages:,} passages of {counts.tokens:,} tokens", file=sys.stderr)
    if args.save_counts:
        print(f"saved {counts.save(args.save_counts)}", file=sys.stderr)
    return counts, examples


def _temperature(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise FastsaeError(f"temperature: got {text!r}, expected auto or a number") from None
