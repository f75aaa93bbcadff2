"""The command line: arguments in, one function call, text or JSON out; a file per
command or two. `fastsae COMMAND --help`."""

import argparse
import sys

from fastsae import __version__
from fastsae.cli.demo import add_demo
from fastsae.cli.explain import add_explain
from fastsae.cli.generate import add_generate
from fastsae.cli.inspect import add_env, add_inspect
from fastsae.cli.label import add_annotate, add_label
from fastsae.cli.results import add_export, add_search
from fastsae.cli.train import add_train
from fastsae.errors import FastsaeError

_COMMANDS = (
    add_demo,
    add_train,
    add_explain,
    add_search,
    add_label,
    add_annotate,
    add_export,
    add_generate,
    add_inspect,
    add_env,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command. A user's mistake is one line on stderr and exit code 2, no traceback."""
    args = _parser().parse_args(argv)
    from fastsae.environment import keep_freed_memory

    keep_freed_memory()
    try:
        args.run(args)
    except FastsaeError as error:
        print(f"fastsae {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"fastsae {args.command}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, not the usage of every option before it."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastsae", description="Explain and steer language models through sparse autoencoders."
    )
    parser.add_argument("--version", action="version", version=f"fastsae {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for add in _COMMANDS:
        add(commands)
    return parser
