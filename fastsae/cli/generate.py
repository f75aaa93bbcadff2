"""fastsae generate."""

import shutil
import sys
import textwrap

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
    policy_arguments(parser)
    parser.add_argument(
        "--layer", type=int_or_str, help="layer or hook point (default: the SAE's own)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--greedy", action="store_true", help="do not sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--trace", metavar="FILE.html", help="write the steered text, coloured by each feature"
    )
    model_arguments(parser)


def policy_arguments(parser) -> None:
    """What to steer with: a policy file, or features and an operation."""
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


def _run_generate(args) -> None:
    from fastsae.sae import SAE
    from fastsae.steering.compare import compare

    policy = policy_of(args)
    sae = SAE.from_pretrained(args.sae, args.sae_id)
    model, tokenizer = load_model(args)
    live = not args.json and sys.stdout.isatty()
    columns = _Columns(args.prompt) if live else None
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
        stream=columns,
    )
    if args.trace is not None:
        _write_trace(args, model, tokenizer, sae, policy, steered)
    if live:
        return
    if args.json:
        print_json({"prompt": args.prompt, "base": base, "steered": steered})
        return
    print(f"base     {args.prompt}{base}\n\nsteered  {args.prompt}{steered}")


class _Columns:
    """Both texts side by side, drawn again in place after every token."""

    def __init__(self, prompt: str):
        self.prompt, self.drawn = prompt, 0
        self.width = max(20, (shutil.get_terminal_size().columns - 3) // 2)

    def __call__(self, base: str, steered: str) -> None:
        columns = [self._lines("base", base), self._lines("steered", steered)]
        height = max(map(len, columns))
        rows = [column + [""] * (height - len(column)) for column in columns]
        up = f"\x1b[{self.drawn}F" if self.drawn else ""
        lines = [f"{a:<{self.width}} │ {b}\x1b[K" for a, b in zip(*rows, strict=True)]
        print(up + "\n".join(lines), flush=True)
        self.drawn = height

    def _lines(self, head: str, text: str) -> list[str]:
        wrapped = textwrap.wrap(self.prompt + text, self.width, drop_whitespace=False)
        return [head, "─" * self.width, *wrapped]


def _write_trace(args, model, tokenizer, sae, policy, steered: str) -> None:
    """Read the steered text once more, steered, with the policy's features traced."""
    from pathlib import Path

    import torch

    from fastsae.steering import steer

    features = sorted({f for operation in policy.operations for f in operation.features})
    ids = tokenizer(args.prompt + steered, return_tensors="pt").to(args.device)
    with (
        torch.inference_mode(),
        steer(model, sae, policy, layer=args.layer) as handle,
        handle.trace(features) as trace,
    ):
        handle.set(policy, prompt_lengths=len(tokenizer(args.prompt).input_ids))
        model(**ids, use_cache=False)
    try:
        Path(args.trace).write_text(trace.to_html(tokenizer), encoding="utf-8")
    except OSError as error:
        raise FastsaeError(f"trace: cannot write {args.trace}: {error}") from error


def policy_of(args):
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
