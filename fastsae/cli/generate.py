"""fastsae generate."""

from fastsae.cli.arguments import command, int_or_str, load_model, model_arguments, print_json
from fastsae.errors import FastsaeError


def add_generate(commands) -> None:
    parser = command(
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
        "--layer", type=int_or_str, help="layer or hook point (default: the SAE's own)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--greedy", action="store_true", help="do not sample")
    parser.add_argument("--seed", type=int, default=0)
    model_arguments(parser)


def _run_generate(args) -> None:
    from fastsae.sae import SAE
    from fastsae.steering.compare import compare

    policy = _policy(args)
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    model, tokenizer = load_model(args)
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
        print_json({"prompt": args.prompt, "base": base, "steered": steered})
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
