"""``wplfast show``: a Fisher by module, as a table, a picture or JSON."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..fisher.spread import SAMPLED, Spread
from ..fisher.summary import Summary
from .fisher_file import fisher_file

#: Metadata that are printed, in this order.
_SHOWN = ("source", "fisher_type", "created", "model", "data")


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "show",
        help="where a model keeps what it knows: a Fisher by module",
        description="Print a Fisher by module: elements, mean, share of the trace, largest entry.",
        epilog="example: wplfast show F.safetensors --depth 2 --plot F.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("file", metavar="F", help="a file of a Fisher")
    command.add_argument("--depth", type=int, metavar="N", help="how many parts of a module's name count")
    command.add_argument("--plot", metavar="FILE", help="draw a picture, too: .png, .svg or .pdf")
    command.add_argument("--json", action="store_true", help="print all rows as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the table; draw the picture."""
    with fisher_file(arguments.file) as file:
        file.check()
        sampled = SAMPLED if arguments.plot else 0
        parts = [Spread.of(name, file.get(name), sampled) for name in file.names]
        summary = Summary.of_parts(parts, file.n_samples, arguments.depth)
        about = {key: file.file.metadata[key] for key in _SHOWN if key in file.file.metadata}
        about |= {"theta_hat": "kept"} if "theta_hat" in file.parts else {}
        about |= {"unfinished": "the same command goes on with it"} if "partial" in file.file.metadata else {}
    if arguments.json:
        print(json.dumps({"file": arguments.file, **about, **summary.to_dict()}, indent=2))
    else:
        for key, value in about.items():
            print(f"{key:<12} {value}")
        print(summary)
    if arguments.plot:
        from ..fisher.plot import draw

        draw(parts, summary.n_samples, arguments.plot)
    return 0
