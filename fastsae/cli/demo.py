"""fastsae demo."""

from fastsae.cli.arguments import command, print_json


def add_demo(commands) -> None:
    parser = command(
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
        print_json(result)
