"""fastsae env."""

from fastsae.cli.arguments import command, print_json


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
