"""Tables of what ``python -m benchmarks distributed`` measured: for the console and for the pages of DDP and FSDP2.

Every table takes the runs of a record, as those of :mod:`.report` do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .plumbing.markdown import spread, table, time
from .report import PAIRS, Lines, Runs, on

USES = ("step", "batch of a pass", "first batch", "consolidate", "wpl()", "add_grad_()")


def _pairs(record: Mapping[str, Any]) -> str:
    """Render a ratio, marked where it is of few pairs."""
    return spread(record["ratio"]) + "\\*" * (record["pairs"] < PAIRS)


def _case(name: str, runs: Runs) -> list[tuple[dict[str, Any], Any]]:
    """Return runs that measured a case, with its records."""
    return [(run, run["records"][name]) for run in runs if name in run["records"]]


def ddp(runs: Runs, details: bool = False) -> Lines:
    """Return passes and whole calls of several ranks over steps of as many: a line for each workload."""
    found, rows = _case("ddp", runs), []
    for records in zip(*(records for _, records in found), strict=True):
        first = records[0]
        sent = sum(each["bytes"] for each in first["collectives_of_a_call"].values())
        cells = [*map(_pairs, records), *(spread(r["whole"]["ratio"]) for r in records)]
        cells += [str(first["whole"]["batches"]), f"{sent / 1e6:.1f}, {first['bytes_of_a_step'] / 1e6:.1f}"]
        if details:
            cells += [time(first["milliseconds"]["unit"]), f"{first['relative_error']:.0e}"]
        rows.append([f"{first['shown']}, {first['ranks']} ranks", *cells])
    heads = [on(what, run) for what in ("pass", "whole call") for run, _ in found]
    heads += ["batches of a call", "MB sent: call, step", *(["step", "error"] if details else [])]
    return table(["Fisher / step under DistributedDataParallel", *heads], rows)


def fsdp2(runs: Runs, details: bool = False) -> Lines:
    """Return batches of a pass over steps of FSDP2: a line for each number of threads."""
    rows = [
        [
            on(f"{r['shown']}, {r['ranks']} ranks", run),
            _pairs(r),
            *(time(r["milliseconds"][way]) for way in ("unit", "fisher")),
            f"{r['relative_error']:.0e}",
        ]
        for run, r in _case("fsdp2", runs)
    ]
    return table(["Fisher / step under FSDP2", "batch of a pass / step", "step", "batch", "error"], rows)


def sent(runs: Runs, details: bool = False) -> Lines:
    """Return what collectives of FSDP2 were called, and how much they were given."""
    found = _case("fsdp2", runs)[0][1]["collectives"]
    kinds = list(dict.fromkeys(kind for use in USES for kind in found[use]))

    def cell(each: Mapping[str, int] | None) -> str:
        if each is None:
            return ""
        size = each["bytes"]
        return f"{each['calls']}, " + (f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes")

    return table(["calls, bytes", *kinds], [[use, *(cell(found[use].get(kind)) for kind in kinds)] for use in USES])


def resident(runs: Runs, details: bool = False) -> Lines:
    """Return the memory of a rank of FSDP2 above the idle model, beside the parts of the contract's sum."""
    found = _case("fsdp2", runs)[0][1]["memory"]
    if found is None:
        return ["Resident memory is read from Linux's /proc alone."]
    rows = [[name, f"{size / 2**20:.1f}"] for name, size in found["bytes"].items()]
    beyond = found["bytes"]["pass"] - found["bytes"]["step"]
    rows.append(["pass - step", f"{beyond / 2**20:.1f}"])
    rows.append(["pass - step, over shards of F", f"{beyond / found['bytes']['shards of F']:.2f}"])
    return table([f"{found['shown']}, {found['ranks']} ranks", "MiB of a rank"], rows)


def end_to_end(runs: Runs, details: bool = False) -> Lines:
    """Return how far apart ranks and one process end up."""
    found = _case("end-to-end", runs)[0][1]
    ranks, own = found["ranks"], found["one_process"]
    rows = [
        ["F of the ranks, from that of one process", f"{own['fisher_off']:.1e}"],
        ["loaded in one process: parameters after the next step", f"{own['loaded_off']:.1e}"],
        ["all in one process: parameters after that step", f"{own['own_off']:.1e}"],
    ]
    if details:
        rows += [[f"{name} on ranks, s", f"{taken:.1f}"] for name, taken in ranks["seconds"].items()]
    head = f"{found['shown']} ({ranks['parameters'] / 1e6:.1f} M), {found['n_ranks']} ranks"
    return table([head, "relative difference"], rows)


CASES = {"ddp": (ddp,), "fsdp2": (fsdp2, sent, resident), "end-to-end": (end_to_end,)}


def distributed(runs: Runs, details: bool = False) -> Lines:
    """Return the tables of all cases that were measured."""
    measured = [make for case, tables in CASES.items() if _case(case, runs) for make in tables]
    return [line for make in measured for line in ("", *make(runs, details))][1:]
