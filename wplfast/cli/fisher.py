"""``wplfast fisher``: the Fisher of a model over data, into a file."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

_EXAMPLES = """examples:
  wplfast fisher --model my-gpt2 --data train.jsonl -o F.safetensors
  wplfast fisher --model my-bert --data train.csv --text-field premise,hypothesis --label-field gold -o F.safetensors
  wplfast fisher --model mine:task -o F.safetensors      # mine.py: def task(): return model, data, loss
  torchrun --nproc-per-node 2 -m wplfast fisher --model my-gpt2 --data train.jsonl -o F.safetensors

A run that was interrupted or killed goes on where it was when the same command is run again.
"""


def add(commands: Any) -> None:
    """Add the command."""
    command = commands.add_parser(
        "fisher",
        help="compute a Fisher and write it to a file",
        description="Compute the diagonal Fisher of a model: the mean over samples of squared per-sample gradients.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    take = command.add_argument
    take("--model", required=True, metavar="DIR|MODULE:FUNCTION",
         help="Hugging Face folder, or a function that returns (model, data, loss), (model, loss), (model, tokenizer) "
              "or a model")  # fmt: skip
    take("--data", metavar="FILE|MODULE:FUNCTION",
         help=".jsonl, .json, .csv, .tsv, .parquet or .txt (a sample a line), or a function that returns batches, a "
              "Dataset, or (either, loss)")  # fmt: skip
    take("-o", "--output", required=True, metavar="FILE", help="the file to write")
    take("--text-field", metavar="NAME[,NAME]", help="column of the text, or of a pair of texts (default: usual names)")
    take("--label-field", metavar="NAME", help="column of the label, tags or target text (default: usual names)")
    take(
        "--max-length", type=_positive, metavar="TOKENS", help="longer samples are cut (default: what the model takes)"
    )
    take("--token-reduction", choices=["sum", "mean"],
         help="how a sample's tokens are combined (default: sum, the log-likelihood; mean changes F by up to T^2)"
    )  # fmt: skip
    take("--fisher-type", choices=["empirical", "mc", "exact"], default="empirical",
         help="targets as given, drawn from the model, or all of them (default: %(default)s)")  # fmt: skip
    take("--mc-samples", type=_positive, default=1, metavar="N", help="draws a sample, for mc (default: %(default)s)")
    take("--likelihood", choices=["categorical", "bernoulli", "gaussian"],
         help="what mc draws from, for a loss of your own (default: categorical)")  # fmt: skip
    take("--params", action="append", metavar="PATTERN",
         help="parameters whose names match, such as 'encoder.*'; may be repeated (default: all that require grad)"
    )  # fmt: skip
    take("--batch-size", type=_positive, default=8, metavar="N", help="samples in a batch (default: %(default)s)")
    take("--max-samples", type=_positive, metavar="N",
         help="so many samples of a file, drawn at random by --seed; the first so many of a function's")  # fmt: skip
    take("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    take("--dtype", choices=["float32", "bfloat16", "float64"],
         help="of a folder's weights while they are used (default: as they are stored)")  # fmt: skip
    take("--seed", type=int, default=0, metavar="N", help="of all that is drawn (default: %(default)s)")
    take("--theta-hat", action="store_true", help="keep the parameters' values beside F, as anchors")
    take("--save-every", type=float, default=60.0, metavar="SECONDS",
         help="how often what is done is written to OUTPUT.partial (default: %(default)g)")  # fmt: skip
    take("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Compute and write the Fisher; print a line about it."""
    from .estimate import ranks, resumable, sources

    _check_output(arguments.output)
    started = time.time()
    with ranks.joined() as own:
        problem = sources.problem(arguments, own)
        if len({json.dumps(identity, default=str) for identity in own.all_say(problem.identity)}) > 1:
            raise ValueError("processes have different models or data: functions must return the same in each of them")
        run_of = (arguments.fisher_type, arguments.mc_samples, arguments.seed, arguments.save_every)
        work = resumable.ResumablePass(problem, own, arguments.output, *run_of)
        try:
            fisher = work.run()
        except resumable.InterruptedPass as stopped:
            print(f"wplfast fisher: {stopped}", file=sys.stderr)
            return 128 + stopped.signal
        said = own.all_say((work.done.left_out, work.done.truncated, work.n_resumed, work.done.state))
        if own.world > 1:
            fisher.all_reduce_()
        elif not fisher.n_samples:
            raise ValueError("there is no sample that has a loss" if work.done.left_out else "data is empty")
        if own.rank == 0:
            left_out, truncated, resumed = (sum(part[i] for part in said) for i in range(3))
            provenance = {**problem.identity, "batches": sorted(part[3] for part in said)}
            fisher.metadata |= {**problem.origin, "provenance": json.dumps(provenance, sort_keys=True)}
            fisher.save(arguments.output, problem.model if arguments.theta_hat else None)
            _report(arguments, fisher, left_out, truncated, resumed, work.slow, time.time() - started)
        own.all_say(None)  # only now is the file there
        work.remove()
    return 0


def _report(
    arguments: argparse.Namespace,
    fisher: Any,
    left_out: int,
    truncated: int,
    resumed: int,
    slow: tuple[str, ...],
    seconds: float,
) -> None:
    """Print what was done."""
    elements = sum(tensor.numel() for tensor in fisher.values())
    if arguments.json:
        found = {
            "output": arguments.output,
            "samples": fisher.n_samples,
            "parameters": len(fisher),
            "elements": elements,
            "trace": float(sum(float(tensor.double().sum()) for tensor in fisher.values())),
            "seconds": round(seconds, 3),
            "resumed": resumed,
            "left_out": left_out,
            "truncated": truncated,
            "one_sample_at_a_time": list(slow),
        }
        print(json.dumps(found, indent=2))
        return
    print(
        f"{arguments.output}: {fisher.n_samples:,} samples, {len(fisher):,} parameters, {elements:,} elements, "
        f"in {seconds:.1f} s"
    )
    if resumed:
        print(f"  {resumed:,} of the samples had been done before")
    if left_out:
        print(f"  {left_out:,} samples were left out: too short to have a loss")
    if truncated:
        print(f"  {truncated:,} samples were cut to the maximal length")
    if slow:
        names = ", ".join(slow[:4]) + (", ..." if len(slow) > 4 else "")
        print(f"  served one sample at a time, which is slower: {names}")


def _check_output(path: str) -> None:
    """Find out now, not after the pass, that the file cannot be written.

    Raises:
        OSError: if there is no such folder, or it or the file may not be written.
        ValueError: if something else is there that would be lost.
    """
    from .. import storage
    from ..fisher.files import KIND

    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(2, "there is no such folder to write to", folder)
    if os.path.isdir(path):
        raise IsADirectoryError(21, "is a folder; -o takes the name of a file", path)
    if not os.access(folder, os.W_OK):
        raise PermissionError(13, "no permission to write to this folder", folder)
    if os.path.exists(path):
        try:
            with storage.opened(path, KIND):
                pass
        except ValueError as error:
            raise ValueError(f"{path} exists and is no Fisher: it is not replaced; choose another -o") from error


def _positive(text: str) -> int:
    """Parse a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
