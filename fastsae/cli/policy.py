"""fastsae policy build, fastsae policy show."""

import argparse
import json
from pathlib import Path

from fastsae.cli.arguments import command, print_json
from fastsae.errors import FastsaeError


def add_policy(commands) -> None:
    parser = command(
        commands,
        "policy",
        lambda args: None,
        "write a policy file from words and annotations, or show what one holds",
        'fastsae policy build words.safetensors --search "security" -o calm.json',
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_build(actions)
    show = command(
        actions,
        "show",
        _run_show,
        "print the policies of a file with their digests",
        "fastsae policy show calm.json",
        json_help="print [{label, digest, policy}]",
    )
    show.add_argument("file", help="policy file (JSON or YAML)")


def _add_build(actions) -> None:
    parser = command(
        actions,
        "build",
        _run_build,
        "write a policy file from words and annotations",
        'fastsae policy build words.safetensors --search "security" --strength 0.5 \\\n'
        "    --annotations harm.json --ablate-harm --name calm --version 1 -o calm.json",
        json_help="print the policy",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "explanations", nargs="?", help="what `fastsae explain --output` wrote; for --search"
    )
    parser.add_argument("--search", help="steer towards the features these words explain")
    parser.add_argument("--top", type=int, default=3, help="features to take (default 3)")
    parser.add_argument("--alive-only", action="store_true", help="leave out dead features")
    parser.add_argument(
        "--way", default="add", choices=("add", "amplify", "calibrate"), help="default: add"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="in --unit (default 1)")
    parser.add_argument(
        "--unit",
        default="max",
        choices=("raw", "max", "mean"),
        help="multiples of each feature's own max (default) or mean activation, or raw",
    )
    parser.add_argument(
        "--annotations", help="what `fastsae annotate` wrote, or JSON {category: [features]}"
    )
    parser.add_argument(
        "--ablate", nargs="+", metavar="CATEGORY", help="remove the features of these categories"
    )
    parser.add_argument(
        "--ablate-harm", action="store_true", help="remove the features of every category of harm"
    )
    parser.add_argument("--phase", default="all", choices=("all", "prompt", "generated"))
    parser.add_argument(
        "--required", action="store_true", help="a request that cannot have it must stop"
    )
    parser.add_argument("--name", help="what requests call it")
    parser.add_argument("--version", help="requests say name@version")
    parser.add_argument("-o", "--output", help="file to write (default: print it)")


def _ablated(args) -> list[int]:
    """The features that --ablate and --ablate-harm name; a plain file holds harm alone."""
    from fastsae.explain.annotate import FORMAT, Annotations
    from fastsae.steering.build import annotated, read_annotations

    path = Path(args.annotations)
    if path.is_file() and FORMAT in path.read_text(encoding="utf-8", errors="replace")[:200]:
        return sorted(Annotations.load(path).features(*(args.ablate or ["harm"])))
    return annotated(read_annotations(path), args.ablate)


def _run_build(args) -> None:
    from fastsae.explain import Explanations
    from fastsae.steering.build import build_policy

    if args.search is not None and args.explanations is None:
        raise FastsaeError("explanations: --search needs the file `fastsae explain` wrote")
    if args.search is None and args.explanations is not None:
        raise FastsaeError("search: give --search WORDS to look for in the explanations")
    wanted = args.ablate_harm or args.ablate is not None
    if wanted != (args.annotations is not None):
        raise FastsaeError("annotations: --ablate and --ablate-harm go with --annotations FILE")
    if args.ablate_harm and args.ablate is not None:
        raise FastsaeError("ablate: --ablate-harm removes every category; drop --ablate")
    policy = build_policy(
        Explanations.load(args.explanations) if args.explanations else None,
        search=args.search,
        top=args.top,
        way=args.way,
        strength=args.strength,
        unit=args.unit,
        alive_only=args.alive_only,
        ablated=_ablated(args) if wanted else (),
        name=args.name,
        version=args.version,
        phase=args.phase,
        required=args.required,
    )
    text = json.dumps(policy.to_dict(), indent=1) + "\n"
    if args.output is None:
        print(text, end="")
        return
    try:
        Path(args.output).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FastsaeError(f"output: cannot write {args.output}: {error}") from error
    if args.json:
        print_json(policy.to_dict())
    else:
        print(f"{args.output}: {policy.label}, digest {policy.digest}")


def _run_show(args) -> None:
    from fastsae.steering import Policy

    held = Policy.from_file(args.file)
    policies = held if isinstance(held, list) else [held]
    if args.json:
        print_json(
            [{"label": p.label, "digest": p.digest, "policy": p.to_dict()} for p in policies]
        )
        return
    for policy in policies:
        operations = ", ".join(f"{o.op} {len(o.features)}" for o in policy.operations)
        print(f"{policy.label}  digest {policy.digest}\n  {operations}; phase {policy.phase}")
