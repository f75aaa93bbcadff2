"""fastsae inspect, fastsae env."""

from fastsae.cli.arguments import command, print_json


def add_inspect(commands) -> None:
    parser = command(
        commands,
        "inspect",
        _run_inspect,
        "show what an SAE checkpoint is",
        "fastsae inspect my-sae",
        json_help="print it as JSON",
    )
    parser.add_argument("sae", help="SAE folder or hub repository")
    parser.add_argument("--sae-id", help="folder inside the repository")
    parser.add_argument("--revision", help="of a hub repository")


def _run_inspect(args) -> None:
    from fastsae.formats.describe import as_text, describe

    found = describe(args.sae, args.sae_id, revision=args.revision)
    print_json(found) if args.json else print(as_text(found))


def add_env(commands) -> None:
    command(
        commands,
        "env",
        _run_env,
        "show versions, hardware, the extension, and which backend serves each op and why",
        "fastsae env",
        json_help="print it as JSON",
    )


def _run_env(args) -> None:
    from fastsae.environment import as_text, describe

    found = describe()
    print_json(found) if args.json else print(as_text(found))
