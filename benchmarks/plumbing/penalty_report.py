"""The README's sections about the penalty: two cases in full, the sweep, several anchors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .markdown import heading, image, row, several, threads, time

NAMES = {
    "add_grad_": "`wpl.add_grad_()`",
    "autograd": "`wpl().backward()`",
    "eager": "eager loop",
    "cat": "flat vector (`torch.cat`)",
    "foreach": "foreach, gradient alone",
    "foreach, value": "foreach, with the value",
    "compile": "torch.compile",
    "apart, loop": "apart, loop over anchors and parameters",
    "apart, foreach": "apart, foreach",
}
ROOFS = ("triad", "triad in place", "copy")
MAPPED = 2**25  # bytes from which glibc maps every block
LARGE = 10**7  # parameters from which bandwidth is what counts


def cases(record: dict[str, Any]) -> list[str]:
    """Render the two cases: a column for each of them and each number of threads."""
    runs = {run["threads"]: run["records"] for run in record["penalty"]}
    columns = [(count, case) for count in runs for case in range(len(runs[count]))]
    columns.sort(key=lambda column: (column[1], column[0]))
    found = [runs[count][case] for count, case in columns]
    heads = [f"{case['case']}, {threads(count)}" for (count, _), case in zip(columns, found, strict=True)]
    lines = heading(["penalty: value and gradient", *heads])
    for name in found[0]["results"]:
        if name not in ROOFS:
            lines.append(row([NAMES.get(name, name), *(time(case["results"].get(name)) for case in found)]))
    shares = [case["results"]["add_grad_"].get("share_of_triad") for case in found]
    cells = [f"{100 * share['median']:.0f} %" if share else "" for share in shares]
    return [*lines, row(["`add_grad_`'s bandwidth, share of a triad", *cells])]


def sweep(record: dict[str, Any] | None) -> str:
    """Render the sweep's figure and latencies, or nothing where it has not been recorded."""
    if not (record and record.get("sweep")):
        return ""
    run = record["sweep"][0]
    found = [r for r in run["records"] if _is_shown(r)]
    names = list(dict.fromkeys(name for r in found for name in r["results"]))
    powers = [math.log10(r["parameters"]) for r in run["records"]]
    lines = image("penalty_cpu.png", "Time of a penalty against the number of parameters, by number of tensors")
    lines += [
        f"From 10^{min(powers):.2g} to 10^{max(powers):.2g} parameters (`python -m benchmarks penalty --compile`); a "
        "triad is `c = a + s b` over arrays of as many bytes as `add_grad_` moves. Median time per call, "
        f"{threads(run['threads'])}:",
        "",
        *heading(["parameters", "tensors", *(NAMES.get(name, name) for name in names)]),
    ]
    for r in found:
        cells = [time(r["results"].get(name), quartiles=False) for name in names]
        lines.append(row([f"{r['parameters']:,}", f"{r['tensors']:,}", *cells]))
    return "\n".join([*lines, "", " ".join([*_remarks(record["sweep"]), *_allocator(record)])])


def _is_shown(record: dict[str, Any]) -> bool:
    """Tell whether the table shows a case: whole decades; of the large ones, where no call's own cost counts, 100."""
    power = math.log10(record["parameters"])
    small = round(power) <= 5
    return abs(power - round(power)) < 0.1 and (record["tensors"] <= 100 if small else record["tensors"] == 100)


def _remarks(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Yield sentences: bandwidths of large cases, what was left out, what was measured in another manner."""
    records = [record for run in runs for record in run["records"]]
    large = [r["results"] for r in records if r["parameters"] >= 0.95 * LARGE and "add_grad_" in r["results"]]
    shares = [100 * results["add_grad_"]["share_of_triad"] for results in large]
    if shares:
        yield (
            f"From {LARGE / 1e6:g} M parameters on, `add_grad_` reaches {min(shares):.0f} to {max(shares):.0f} % of "
            "the triad's bandwidth."
        )
    if seconds := {(r["tensors"], r["compile_seconds"]) for r in records if "compile_seconds" in r}:
        count = max(tensors for tensors, _ in seconds)
        found = sorted(taken for tensors, taken in seconds if tensors == count)
        yield (
            f"torch.compile unrolls the loop over tensors: {found[len(found) // 2]:.0f} s for {count:,} of them, "
            "measured at whole decades, and left out for more."
        )
    if apart := [r["parameters"] for r in records if not r["interleaved"]]:
        yield f"From {min(apart) / 1e6:.0f} M parameters on, contenders ran one after another, not interleaved."
    short = {way: r["parameters"] for r in reversed(records) for way, why in r["left_out"].items() if "GB" in why}
    for way, parameters in sorted(short.items()):
        yield f"Left out at {parameters / 1e6:.0f} M for lack of memory: {NAMES[way]}."


def _allocator(record: dict[str, Any]) -> Iterator[str]:
    """Yield a sentence about what the flat vector costs with and without freed memory kept, where both are known."""
    run = record["sweep"][0]
    usual = [
        r for r in record.get("penalty", []) if r["threads"] == run["threads"] and "cat" in r["records"][0]["results"]
    ]
    if not (usual and run["keeps_freed_memory"]) or usual[0]["keeps_freed_memory"]:
        return
    case = usual[0]["records"][0]
    if 4 * case["parameters"] <= MAPPED:
        return
    near = [r for r in run["records"] if r["tensors"] == 100 and abs(r["parameters"] / case["parameters"] - 1) < 0.1]
    for found in near[:1]:
        before, kept = (time(r["results"]["cat"], quartiles=False) for r in (case, found))
        yield (
            "Freed memory is kept here. In the table before, with glibc's defaults, temporaries above 32 MB are mapped "
            f"anew in every call: the flat vector of {case['case']} takes {before} there, that of 100 tensors {kept} "
            "here."
        )


def anchors(record: dict[str, Any] | None) -> str:
    """Render several anchors, active sets and consolidation, or nothing where they have not been recorded."""
    if not (record and record.get("anchors")):
        return ""
    run = record["anchors"][0]
    found = run["records"]
    names = list(found["merged"][0]["results"])
    lines = [
        f"K anchors: `consolidate` merges them, beside K anchors kept apart; {found['parameters'] / 1e6:.3g} M "
        f"parameters in {found['tensors']} tensors, {threads(run['threads'])}, median time (over that of K = 1), and "
        "`add_grad_`'s relative errors against the K penalties in float64 (`python -m benchmarks anchors`):",
        "",
        *heading(["K", *(NAMES.get(name, name) for name in names), "error of the gradient", "of the value"]),
    ]
    for line in found["merged"]:
        results = [line["results"][name] for name in names]
        cells = [f"{time(result, quartiles=False)} ({result['over_base']['median']:.3g})" for result in results]
        errors = line["results"]["add_grad_"]["relative_error"]
        lines.append(row([str(line["anchors"]), *cells, f"{errors['gradient']:.1e}", f"{errors['value']:.1e}"]))
    return "\n".join([*lines, "", " ".join(_sentences(found))])


def _sentences(found: dict[str, Any]) -> Iterator[str]:
    """Yield sentences about active sets, consolidation and the dtype of F."""
    shares = several([f"{100 * line['elements']:.3g}" for line in found["active"]])
    ratios = {
        name: several([f"{line['results'][name]['over_base']['median']:.2g}" for line in found["active"]])
        for name in ("add_grad_", "autograd")
    }
    yield (
        f"An active set of {shares} % of the parameters (`wpl.subset(names)`) takes {ratios['add_grad_']} of the "
        f"whole's time with `add_grad_`, {ratios['autograd']} with `wpl().backward()`."
    )
    parts = found["consolidate"]
    merge, replace = (time(parts[how], quartiles=False) for how in ("merge", "replace"))
    smaller = [f"{parts[f'{how}, active']['over_base']['median']:.2g}" for how in ("merge", "replace")]
    yield (
        f"`consolidate` takes {merge} to merge a second anchor and {replace} to replace the first, and {smaller[0]} "
        f"and {smaller[1]} of that for {100 * parts['active_elements']:.2g} % of the parameters."
    )
    if found.get("fisher_dtype"):
        add, back = (found["fisher_dtype"][f"{name}, bfloat16"] for name in ("add_grad_", "autograd"))
        yield (
            f"With F in bfloat16, `add_grad_` takes {add['over_base']['median']:.2g} and `wpl().backward()` "
            f"{back['over_base']['median']:.2g} of the time with float32; the gradient's relative error is "
            f"{add['relative_error']['gradient']:.1g}."
        )
