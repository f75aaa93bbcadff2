"""fastsae sweep."""

from pathlib import Path

from fastsae.cli.arguments import command, int_or_str, load_model, model_arguments, print_json
from fastsae.cli.generate import policy_arguments, policy_of
from fastsae.errors import FastsaeError

_TEXTS = (
    "The weather was calm that morning, and most people had already gone to work when it began.",
    "She opened the door, looked around the room, and sat down at the table by the window.",
    "There are many ways to solve a problem, but the first one is seldom the best of them.",
    "In the last ten years the town has changed, and its people have changed with it.",
)


def add_sweep(commands) -> None:
    parser = command(
        commands,
        "sweep",
        _run,
        "find the right strength: topic words against perplexity at several strengths",
        'fastsae sweep my-sae --add 12 99 --words "guitar concert album" --plot sweep.svg',
        json_help="print [{strength, topic, perplexity, dose}]",
    )
    parser.add_argument("sae", help="SAE folder or hub repository")
    parser.add_argument("--sae-id", help="folder inside the repository")
    policy_arguments(parser)
    parser.add_argument(
        "--strengths",
        type=float,
        nargs="+",
        default=[0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3],
        metavar="S",
        help="multiply the policy by these (default 0 0.25 0.5 0.75 1 1.5 2 3)",
    )
    parser.add_argument("--words", required=True, help="words of the topic, not those searched for")
    parser.add_argument("--text", help="text file, a paragraph a line (default: four sentences)")
    parser.add_argument("--plot", metavar="FILE.svg", help="write the trade-off curve")
    parser.add_argument(
        "--layer", type=int_or_str, help="layer or hook point (default: the SAE's own)"
    )
    model_arguments(parser)


def _run(args) -> None:
    from fastsae.sae import SAE
    from fastsae.steering.sweep import sweep, to_svg

    policy = policy_of(args)
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    texts = _TEXTS if args.text is None else _lines(args.text)
    model, tokenizer = load_model(args)
    points = sweep(
        model,
        tokenizer,
        sae.to(args.device),
        policy,
        args.strengths,
        words=args.words.replace(",", " ").split(),
        texts=texts,
        layer=args.layer,
    )
    if args.plot is not None:
        try:
            title = f"{policy.label}: {args.words}"
            Path(args.plot).write_text(to_svg(points, title=title), encoding="utf-8")
        except OSError as error:
            raise FastsaeError(f"plot: cannot write {args.plot}: {error}") from error
    if args.json:
        print_json([point._asdict() for point in points])
        return
    print("strength  topic words  perplexity  largest dose")
    for p in points:
        print(f"{p.strength:8g}  {p.topic:11.5f}  {p.perplexity:10.4g}  {p.dose:12.3g}")


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FastsaeError(f"text: cannot read {path}: {error}") from error
    return [line for line in lines if line.strip()]
