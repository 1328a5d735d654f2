"""Tables of what ``python -m benchmarks.gpu`` measured, in Markdown: for its text file, the console and the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .plumbing.markdown import heading, row, spread

KERNELS = ("value", "value and gradient", "add_grad_")
OURS = "wplfast"  # among the contenders of a kernel
LEAST = 10**6  # parameters from which bandwidth is what counts
Found = Mapping[str, Any]
Lines = list[str]


def section(record: Found | None) -> str:
    """Render a record, or nothing where there is none."""
    parts = record["parts"] if record else {}
    place = next((part["place"] for part in parts.values() if "place" in part), None)
    if record is None or place is None:
        return ""
    where = [str(place["hardware"].get("gpu") or place["hardware"]["cpu"])]
    where += [
        f"{name} {place['versions'][name]}" for name in ("driver", "torch", "triton") if place["versions"].get(name)
    ]
    words = f"{', '.join(where)}; medians [quartiles] of interleaved runs, TF32 off unless named."
    words += " **A rehearsal with tiny sizes: no measurement.**" if record["quick"] else ""
    blocks = [[words]]
    for name, table in TABLES.items():
        found = parts.get(name, {}).get("cases")
        if not found:
            continue
        try:
            blocks.append(table(found))
        except Exception as error:  # a table must not cost what it would show
            blocks.append([f"The table of {name} failed: {type(error).__name__}: {error}"])
    for title, key in (("Failed or wrong", "errors"), ("Left out", "left_out")):
        if cases := [f"{part}: {case}" for part, found in parts.items() for case in found[key]]:
            blocks.append([f"{title} in this run: {'; '.join(cases)}."])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _wrong(record: Found) -> str:
    """Mark a wrong result."""
    if not record["right"]:
        return " **wrong**"
    return "" if record.get("same_bits_twice", True) else " **two runs differ**"


def _us(record: Found, name: str) -> str:
    """Render the time of one contender of a kernel."""
    return f"{1e3 * record['times'][name]['milliseconds']['median']:.3g} µs"


def roofs(found: Found) -> Lines:
    """Render memory's bandwidth, products' rates and the smallest operation."""
    lines = heading(["roof", "of the same run"])
    for name, r in found.get("memory", {}).items():
        if isinstance(r, dict):
            lines.append(row([name, f"{r['gigabytes_per_second']:,.0f} GB/s"]))
    lines += [row([k, f"{r['teraflops_per_second']:,.1f} TFLOP/s"]) for k, r in found.items() if "side" in r]
    for name, r in found.get("smallest operation", {}).items():
        if isinstance(r, dict):
            lines.append(row([f"an operation on 16 numbers, {name}", f"{r['microseconds']['median']:.2f} µs"]))
    return lines


def fisher(found: Found) -> Lines:
    """Render passes and whole calls over ordinary passes, memory beyond the model, and the whole model's error."""
    heads = ["ordinary", "pass", "goal", "whole call", "GB: ordinary, pass, F", "error (of a loop)"]
    lines = heading(["Fisher / ordinary forward and backward", *heads])
    for r in found.values():
        whole = r["whole"]
        call = f"{whole['projected_ratio']:.3g}\\*" if whole["capped"] else spread(whole["ratio"])
        held = ", ".join(f"{r['peak_bytes'][key] / 1e9:.2g}" for key in ("unit", "fisher_pass", "one_fisher"))
        error = f"{r['errors']['fisher']['whole']:.1e}"
        error += f" ({r['errors']['loop']['whole']:.1e})" if "loop" in r["errors"] else ""
        unit = f"{r['milliseconds']['unit']['median']:.3g} ms"
        slow = f" (slow: {len(r['slow'])})" if r["slow"] else ""
        lines.append(
            row([r["shown"] + _wrong(r) + slow, unit, spread(r["ratio"]), f"{r['target']:.2f}", call, held, error])
        )
    return lines


def linear(found: Found) -> Lines:
    """Render the linear layers' kernel beside the plain product."""
    heads = ["time", "TFLOP/s", "of cuBLAS's `G^T A`", "goal", "of the copy", "host", "error"]
    lines = heading(["`fisher_linear_`", *heads])
    for name, r in found.items():
        goal = f"{100 * r['target']:.0f} %" if r["target"] else ""
        cells = [_us(r, OURS), f"{r['teraflops_per_second']:.0f}", spread(r["share_of_plain"], 100, " %"), goal]
        lines.append(row([f"N={r['n']}, T={r['t']}: {name}{_wrong(r)}", *cells, *_beside(r)]))
    return lines


def layers(found: Found) -> Lines:
    """Render the other kernels beside PyTorch's plain gradients."""
    lines = heading(["other Fisher kernels", "time", "over the plain gradient", "of the copy", "host", "error"])
    for name, r in found.items():
        over = f"{1 / r['share_of_plain']['median']:.2g}"
        lines.append(row([name + _wrong(r), _us(r, OURS), over, *_beside(r)]))
    return lines


def _beside(r: Found) -> list[str]:
    """Render a kernel's share of the copy's bandwidth, the host's time for a call, and the error."""
    host = f"{r['times'][OURS]['host_microseconds']:.0f} µs"
    return [f"{100 * r['share_of_copy']['median']:.0f} %", host, f"{r['relative_error']['fisher']:.0e}"]


def penalty(found: Found) -> Lines:
    """Render the penalty's shares of the copy, its times, and what others take over that of ``add_grad_``."""
    others = ("autograd", "eager", "foreach", "foreach, value")
    heads = [*(f"{name}, of the copy" for name in KERNELS), "add_grad_", "as called", "in a graph", *others]
    lines = heading(["penalty", *heads])
    for name, r in found.items():
        results = r["results"]
        large = r["parameters"] >= LEAST
        cells = [f"{100 * results[k]['share_of_copy']['median']:.0f} %" if large else "" for k in KERNELS]
        for way in ("add_grad_", "add_grad_, as called", "add_grad_, in a CUDA graph"):
            cells.append(f"{1e3 * results[way]['milliseconds']['median']:.3g} µs" if way in results else "-")
        cells += [f"{results[way]['over_add_grad_']['median']:.2g}x" if way in results else "-" for way in others]
        lines.append(row([name + _wrong(r), *cells]))
    return lines


def compiled(found: Found) -> Lines:
    """Render the penalty beside torch.compile, as called."""
    lines = heading(["penalty", "add_grad_", "torch.compile over it", "torch.compile over `wpl().backward()`"])
    for name, r in found.items():
        ours, graph = r["results"]["add_grad_"], r["results"]["autograd"]
        ratios = [spread(way["compile_over_it"]) for way in (ours, graph)]
        lines.append(row([name, f"{1e3 * ours['milliseconds']['median']:.3g} µs", *ratios]))
    return lines


def peers(found: Found) -> Lines:
    """Render other libraries' time over that of an ordinary pass, and peak memory."""
    ways = list(next(iter(found.values()))["contenders"])
    lines = heading(["Fisher of one batch / ordinary pass", *ways])
    for r in found.values():
        cells = []
        for way in ways:
            result = r["contenders"][way]
            if "ratio" in result:
                memory = f"{result['peak_bytes'] / 1e9:.2g} GB"
                cells.append(f"{result['ratio']['median']:.3g}, {memory}{_wrong(result)}")
            else:
                cells.append(result["error"].partition(":")[0])
        lines.append(row([r["shown"], *cells]))
    return lines


def profile(found: Found) -> Lines:
    """Render where the time of passes goes, and the kernels that a Fisher pass spends most in."""
    lines = heading(["profile", "wall ms", "host ms", "busy ms", "gaps", "kernels", "ours", "most of it in"])
    for name, record in found.items():
        for what in ("fisher", "unit"):
            r = record[what]
            times = [f"{r[key]:.2f}" for key in ("wall_ms", "host_ms", "busy_ms")]
            top = ", ".join(f"{k['share']:.0%} {k['name'][:40]}" for k in r["top"][:3])
            shares = [f"{r['gaps']:.0%}", str(r["kernels"]), f"{r['share_of_ours']:.0%}", top]
            lines.append(row([f"{name}, {what}", *times, *shares]))
    return lines


def tiles(found: Found) -> Lines:
    """Render the tiles of each layer, the fastest first."""
    lines = heading(["layer", "tile", "time", "of cuBLAS's `G^T A`", "gain over the default"])
    for name, r in found.items():
        ranked = sorted(r["tiles"].items(), key=lambda item: item[1]["milliseconds"]["median"])
        for tile, result in ranked:
            gain = spread(result["gain_over_default"]) if "gain_over_default" in result else ""
            cells = [spread(result["milliseconds"], 1e3, " µs"), spread(result["share_of_plain"], 100, " %"), gain]
            lines.append(row([name, tile, *cells]))
        lines += [row([name, tile, f"left out: {why[:80]}", "", ""]) for tile, why in r["left_out"].items()]
    return lines


TABLES: dict[str, Callable[[Found], Lines]] = {
    "roofs": roofs, "fisher": fisher, "linear": linear, "layers": layers, "penalty": penalty, "compiled": compiled,
    "peers": peers, "profile": profile, "tiles": tiles,
}  # fmt: skip
