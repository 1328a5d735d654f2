"""Tables of what ``python -m benchmarks.gpu`` measured, in Markdown: for its text file, the console and the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from . import report
from .plumbing.markdown import spread, table, time

OURS = "wplfast"  # among the contenders of a kernel
KERNELS = ("value", "value and gradient", "accumulate")
OTHERS = ("autograd", "eager", "foreach", "foreach, value")
LEAST = 10**6  # parameters from which bandwidth is what counts
Found = Mapping[str, Any]
Lines = list[str]


def section(record: Found | None) -> str:
    """Render a record, or nothing where there is none."""
    parts = record["parts"] if record else {}
    place = next((part["place"] for part in parts.values() if "place" in part), None)
    if record is None or place is None:
        return ""
    versions = {name: place["versions"].get(name) for name in ("driver", "torch", "triton")}
    where = [place["hardware"].get("gpu") or place["hardware"]["cpu"]]
    where += [f"{name} {version}" for name, version in versions.items() if version]
    words = f"{', '.join(where)}; medians [quartiles] of interleaved runs, TF32 off unless named."
    blocks = [[words + " **A rehearsal with tiny sizes: no measurement.**" * record["quick"]]]
    for name, make in TABLES.items():
        if found := parts.get(name, {}).get("cases"):
            try:
                blocks.append(make(found))
            except Exception as error:  # a table must not cost what it would show
                blocks.append([f"The table of {name} failed: {type(error).__name__}: {error}"])
    for title, key in (("Failed or wrong", "errors"), ("Left out", "left_out")):
        if cases := [f"{part}: {case}" for part, found in parts.items() for case in found[key]]:
            blocks.append([f"{title} in this run: {'; '.join(cases)}."])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _named(name: str, r: Found) -> str:
    """Return a case's name, marked where its result is wrong."""
    return name + " **wrong**" * (not r["right"]) + " **two runs differ**" * (not r.get("same_bits_twice", True))


def _percent(share: Found) -> str:
    """Render the median of a share."""
    return f"{100 * share['median']:.0f} %"


def roofs(found: Found) -> Lines:
    """Return memory's bandwidth, products' rates and the smallest operation."""
    rows = [[k, f"{r['gigabytes_per_second']:,.0f} GB/s"] for k, r in _parts(found, "memory")]
    rows += [[k, f"{r['teraflops_per_second']:,.1f} TFLOP/s"] for k, r in found.items() if "side" in r]
    smallest = _parts(found, "smallest operation")
    rows += [[f"an operation on 16 numbers, {k}", f"{r['microseconds']['median']:.2f} µs"] for k, r in smallest]
    return table(["roof", "of the same run"], rows)


def _parts(found: Found, case: str) -> list[tuple[str, Found]]:
    """Return what a case measured, without what a part's record adds."""
    return [(name, r) for name, r in found.get(case, {}).items() if isinstance(r, dict)]


def fisher(found: Found) -> Lines:
    """Return passes and whole calls over ordinary passes."""
    return report.fisher([{"records": list(found.values())}], details=True)


def peers(found: Found) -> Lines:
    """Return other libraries' time over that of an ordinary pass, and peak memory."""
    return report.peers([{"records": list(found.values())}])


def _kernel(name: str, r: Found, *cells: str) -> list[str]:
    """Return a kernel's cells: its time, others, share of the copy, the host's time for a call, error."""
    ours = r["times"][OURS]
    beside = [
        _percent(r["share_of_copy"]),
        f"{ours['host_microseconds']:.0f} µs",
        f"{r['relative_error']['fisher']:.0e}",
    ]
    return [_named(name, r), time(ours["milliseconds"], quartiles=False), *cells, _percent(r["share_of_copy"]), *beside]


def linear(found: Found) -> Lines:
    """Return the linear layers' kernel beside the plain product."""
    rows = [
        _kernel(
            f"N={r['n']}, T={r['t']}: {name}", r, f"{r['teraflops_per_second']:.0f}",
            spread(r["times"][OURS]["share_of_plain"], 100, " %"), f"{100 * r['target']:.0f} %" if r["target"] else "",
        )
        for name, r in found.items()
    ]  # fmt: skip
    heads = ("time", "TFLOP/s", "of cuBLAS's `G^T A`", "goal", "of the copy", "host", "error")
    return table(["`fisher_linear_`", *heads], rows)


def layers(found: Found) -> Lines:
    """Return the other kernels beside PyTorch's plain gradients."""
    rows = [_kernel(name, r, f"{1 / r['times'][OURS]['share_of_plain']['median']:.2g}") for name, r in found.items()]
    heads = ("time", "over the plain gradient", "of the copy", "host", "error")
    return table(["other Fisher kernels", *heads], rows)


def penalty(found: Found) -> Lines:
    """Return the penalty's shares of the copy, times of ``add_grad_``, and what others take over it as called."""
    rows = []
    for name, record in found.items():
        r, large = record["results"], record["parameters"] >= LEAST
        cells = [_percent(r[kernel]["share_of_copy"]) if large else "" for kernel in KERNELS]
        cells += [time(r.get(way, {}).get("milliseconds"), False) for way in ("accumulate", "add_grad_", "graph")]
        called = r["add_grad_"]["milliseconds"]["median"]
        cells += [f"{r[way]['milliseconds']['median'] / called:.2g}x" if way in r else "-" for way in OTHERS]
        rows.append([name, *cells])
    heads = [
        *(f"{kernel}, of the copy" for kernel in KERNELS),
        "on the device",
        "as called",
        "in a CUDA graph",
        *OTHERS,
    ]
    return table(["penalty", *heads], rows)


def compiled(found: Found) -> Lines:
    """Return the penalty beside torch.compile, as called."""
    rows = []
    for name, record in found.items():
        ways = [record["results"][way] for way in ("add_grad_", "autograd")]
        rows.append([name, time(ways[0]["milliseconds"]), *(spread(way["compile_over_it"]) for way in ways)])
    return table(["penalty", "add_grad_", "torch.compile over it", "torch.compile over `wpl().backward()`"], rows)


def profile(found: Found) -> Lines:
    """Return where the time of passes goes, and the kernels that they spend most in."""
    rows = []
    for name, record in found.items():
        for what in ("fisher", "unit"):
            r = record[what]
            top = ", ".join(f"{k['share']:.0%} {k['name'][:40]}" for k in r["top"][:3])
            times = [f"{r[key]:.2f}" for key in ("wall_ms", "host_ms", "busy_ms")]
            rows.append([f"{name}, {what}", *times, str(r["kernels"]), f"{r['share_of_ours']:.0%}", top])
    return table(["profile", "wall ms", "host ms", "busy ms", "kernels", "ours", "most of it in"], rows)


def tiles(found: Found) -> Lines:
    """Return the tiles of each layer, the fastest first, beside what the library takes by itself."""
    rows = []
    for name, r in found.items():
        for tile, result in sorted(r["times"].items(), key=lambda item: item[1]["milliseconds"]["median"]):
            cells = [spread(result["share_of_plain"], 100, " %"), spread(result["gain"])]
            rows.append([name, tile, time(result["milliseconds"]), *cells])
        rows += [[name, tile, f"left out: {why[:80]}", "", ""] for tile, why in r["left_out"].items()]
    return table(["layer", "tile", "time", "of cuBLAS's `G^T A`", "gain over the library's"], rows)


TABLES: dict[str, Callable[[Found], Lines]] = {
    "roofs": roofs, "fisher": fisher, "linear": linear, "layers": layers, "penalty": penalty, "compiled": compiled,
    "peers": peers, "profile": profile, "tiles": tiles,
}  # fmt: skip
