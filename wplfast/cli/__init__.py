"""The command line, ``wplfast COMMAND`` or ``python -m wplfast COMMAND``: one module a command.

A command's module has ``add(commands)``, which adds its parser with ``run`` among the parser's defaults, and
``run(arguments)``, which does the work and returns the exit code. ``estimate/`` is what ``fisher`` is made of.

Exit codes: 0, all is well; 1, what was looked at is wrong; 2, a wrong command line, or an error, which is one line;
130, interrupted (128 and the signal's number). ``WPLFAST_DEBUG=1`` shows an error's traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from .. import __version__
from . import check, diff, fisher, info, merge, selftest, show

COMMANDS = (info, selftest, fisher, show, diff, merge, check)
_EXAMPLES = """examples:
  wplfast info                     what is installed, and what will run where
  wplfast selftest --device cuda   every operator on a GPU against plain PyTorch in float64
  wplfast fisher --model my-gpt2 --data train.jsonl -o F.safetensors
  wplfast show F.safetensors --plot F.png
  wplfast diff A.safetensors B.safetensors
  wplfast merge A.safetensors B.safetensors -o C.safetensors
  wplfast check F.safetensors --model my-gpt2

exit codes: 0 all is well, 1 what was looked at is wrong, 2 an error or a wrong command line, 130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with a command line, as commands do; so do its commands'."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    found = _Parser(
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
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"wplfast {arguments.command}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("WPLFAST_DEBUG", "0") not in ("", "0"):
            raise
        print(f"wplfast {arguments.command}: error: {' '.join(_told(error).split())}", file=sys.stderr)
        return 2
    return code


def _told(error: Exception) -> str:
    """Say what is wrong."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    if isinstance(error, (OSError, RuntimeError, ValueError, ImportError)):
        return str(error)
    return f"{type(error).__name__}: {error} (WPLFAST_DEBUG=1 shows where)"
