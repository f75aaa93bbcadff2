"""The command line: arguments in, one function call, text or JSON out; a file per
command or two. `fastsae COMMAND --help`."""

import argparse
import sys

from fastsae import __version__
from fastsae.cli.checkpoint import add_convert, add_inspect
from fastsae.cli.demo import add_demo
from fastsae.cli.env import add_env
from fastsae.cli.eval import add_eval, add_train_lens
from fastsae.cli.explain import add_explain
from fastsae.cli.generate import add_generate
from fastsae.cli.label import add_annotate, add_label
from fastsae.cli.policy import add_policy
from fastsae.cli.results import add_export, add_search
from fastsae.cli.serve import add_serve
from fastsae.cli.sweep import add_sweep
from fastsae.cli.train import add_train
from fastsae.errors import FastsaeError

_COMMANDS = (
    add_demo,
    add_train,
    add_train_lens,
    add_explain,
    add_search,
    add_eval,
    add_label,
    add_annotate,
    add_export,
    add_policy,
    add_sweep,
    add_generate,
    add_serve,
    add_inspect,
    add_convert,
    add_env,
)


def main(argv: list[str] | None = None) -> int:
    """Run one command. A user's mistake is one line on stderr and exit code 2, no traceback."""
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_args(argv)
    args.argv = list(argv)
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
