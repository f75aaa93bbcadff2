"""fastsae label, fastsae annotate: what a language model says about features."""

import sys
from collections import Counter

from fastsae.cli.arguments import command, model_arguments, print_json
from fastsae.errors import FastsaeError


def add_label(commands) -> None:
    parser = command(
        commands,
        "label",
        _run_label,
        "have a language model write a line about every feature, and judge it; kept beside the "
        "explanations; a stopped run continues",
        "fastsae label words.safetensors --url http://localhost:8000/v1 --llm my-model",
        json_help="print [{feature, text, verdict, model}]",
    )
    _arguments(parser)


def add_annotate(commands) -> None:
    parser = command(
        commands,
        "annotate",
        _run_annotate,
        "find the features of harm (S1-S14) and of defence (D1-D7): by a lexicon, or by a language "
        "model (--url or --local); kept beside the explanations",
        "fastsae annotate words.safetensors",
        json_help="print [{feature, category, score, because}]",
    )
    parser.add_argument("--categories", nargs="+", help="category files instead of the defaults")
    parser.add_argument(
        "--min-score", type=float, default=0.2, help="of the lexicon, 0..1 (default 0.2)"
    )
    _arguments(parser)


def _arguments(parser) -> None:
    parser.add_argument("explanations", help="what `fastsae explain --output` wrote")
    parser.add_argument("--features", type=int, nargs="+", help="only these (default all)")
    parser.add_argument("--url", help="an OpenAI-compatible endpoint, up to and with /v1")
    parser.add_argument("--llm", help="name of the endpoint's model")
    parser.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        help="environment variable that holds the endpoint's key (default OPENAI_API_KEY)",
    )
    parser.add_argument("--local", action="store_true", help="ask --model instead of an endpoint")
    parser.add_argument("--workers", type=int, default=4, help="requests at a time (default 4)")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds of one request")
    parser.add_argument("--retries", type=int, default=6, help="of a failed request (default 6)")
    parser.add_argument(
        "--prices",
        type=float,
        nargs=2,
        metavar=("IN", "OUT"),
        help="of a million prompt and answer tokens, to show the cost",
    )
    model_arguments(parser)


def _chat(args):
    """The language model that the options name, or None."""
    if args.url and args.local:
        raise FastsaeError("url, local: give one of the two")
    if args.url:
        from fastsae.explain.chat import Endpoint

        if not args.llm:
            raise FastsaeError("llm: missing; name the endpoint's model with --llm")
        return Endpoint(
            args.url,
            args.llm,
            key_variable=args.key_variable,
            timeout=args.timeout,
            retries=args.retries,
        )
    if args.local:
        from fastsae.cli.arguments import load_model
        from fastsae.explain.chat import LocalModel

        return LocalModel(*load_model(args))
    return None


def _asked(args) -> dict:
    from fastsae.explain.finder import companion

    return {
        "cache": companion(args.explanations, "answers.jsonl"),
        "workers": 1 if args.local else args.workers,
        "prices": args.prices and tuple(args.prices),
        "progress": True,
    }


def _run_label(args) -> None:
    from fastsae.cli.results import parts
    from fastsae.explain import Explanations
    from fastsae.explain.finder import companion
    from fastsae.explain.labels import Labels, label_features

    chat = _chat(args)
    if chat is None:
        raise FastsaeError("url: give an endpoint (--url, --llm) or --local")
    explanations, known = Explanations.load(args.explanations), parts(args.explanations)
    features = range(len(explanations)) if args.features is None else args.features
    new = label_features(explanations, chat, features, known.get("examples"), **_asked(args))
    kept = known.get("labels") or Labels(new.digest)
    if kept.digest != new.digest:
        raise FastsaeError("labels: the file beside the explanations is another SAE's; remove it")
    kept.update(new)
    saved = kept.save(companion(args.explanations, "labels.jsonl"))
    if args.json:
        print_json([{"feature": f, **label._asdict()} for f, label in new.items()])
    else:
        for feature, label in list(new.items())[:20]:
            print(f"{feature:7}  {label.verdict or '?':9} {label.text}")
    verdicts = Counter(label.verdict or "no verdict" for label in new.values())
    told = ", ".join(f"{name} {count}" for name, count in verdicts.most_common())
    print(f"saved {saved} ({told})", file=sys.stderr)


def _run_annotate(args) -> None:
    from fastsae.cli.results import parts
    from fastsae.explain import Explanations
    from fastsae.explain.annotate import annotate_by_lexicon, annotate_by_model, categories
    from fastsae.explain.finder import companion

    chat, known = _chat(args), categories(*args.categories or ())
    explanations = Explanations.load(args.explanations)
    if chat is None:
        found = annotate_by_lexicon(
            explanations, known, features=args.features, min_score=args.min_score
        )
    else:
        features = range(len(explanations)) if args.features is None else args.features
        examples = parts(args.explanations).get("examples")
        found = annotate_by_model(explanations, chat, features, known, examples, **_asked(args))
    saved = found.save(companion(args.explanations, "annotations.json"))
    if args.json:
        print_json([entry._asdict() for entry in found.entries])
    else:
        for category in known:
            features = found.features(category.code)
            first = "; ".join(f"{f} {' '.join(explanations.words(f)[:3])}" for f in features[:3])
            print(f"{category.code:4} {category.name:28} {len(features):6}  {first}")
    print(f"saved {saved} ({found.method})", file=sys.stderr)
