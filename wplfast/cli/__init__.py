"""The command line, ``wplfast COMMAND`` or ``python -m wplfast COMMAND``: one module a command.

A command's module has ``add(commands)``, which adds its parser with ``run`` among the parser's defaults, and
``run(arguments)``, which does the work and returns the exit code.

Exit codes: 0, all is well; 1, what was looked at is wrong; 2, a wrong command line, or an error, which is one line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import info, selftest

COMMANDS = (info, selftest)
_EXAMPLES = """examples:
  wplfast info                     what is installed, and what will run where
  wplfast selftest --device cuda   every operator on a GPU against plain PyTorch in float64

exit codes: 0 all is well, 1 what was looked at is wrong, 2 an error or a wrong command line
"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    found = argparse.ArgumentParser(
        prog="wplfast",
        description="The diagonal Fisher and the weight plasticity penalty, from the command line.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--version", action="version", version=f"wplfast {__version__}")
    commands = found.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(commands)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"wplfast {arguments.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return code
