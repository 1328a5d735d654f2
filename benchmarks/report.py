"""Tables of what was measured, in Markdown: printed after a run, and in the README from the records in ``results``.

``python -m benchmarks readme`` fills the README's sections. Every table takes the runs of one part of a record, one for
each number of threads; ``details`` adds what the console shows and the README leaves out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .experiments.two_models import report as two_models
from .gpu_report import section as gpu_section
from .plumbing.markdown import RESULTS, heading, image, row, spread, threads, time

ROOT = Path(__file__).parent.parent
CURVES = "Accuracy of A and B while B is trained"
UNMEASURED = "GPU speed is unmeasured."
NAMES = {
    "add_grad_": "`wpl.add_grad_()`",
    "autograd": "`wpl().backward()`",
    "functional": "`functional.wpl_penalty`",
    "eager": "eager loop",
    "cat": "flat vector (`torch.cat`)",
    "foreach": "foreach, gradient alone",
    "foreach, value": "foreach, with the value",
    "compile": "torch.compile",
    "apart, loop": "apart, loop over anchors and parameters",
    "apart, foreach": "apart, foreach",
    "torch.func": "`torch.func`: `vmap(grad)`",
    "loop": "one-sample loop",
}
ROOFS = ("triad", "triad in place", "copy")
OURS, BASELINES = ("add_grad_", "autograd", "functional"), ("eager", "foreach", "cat", "compile")
LARGE = 10**6  # parameters from which bandwidth is what counts
SHOWN = 2  # cases of the penalty that the README shows
PAIRS = 30  # below so many, a ratio is marked

Runs = Sequence[dict[str, Any]]
Lines = list[str]


def penalty(runs: Runs, details: bool = False) -> Lines:
    """Return a column for each case and number of threads, a line for each way."""
    columns = [(run["threads"], record) for run in runs for record in run["records"][: None if details else SHOWN]]
    order = [record["case"] for record in runs[0]["records"]]
    columns.sort(key=lambda column: (order.index(column[1]["case"]), column[0]))
    found = [record["results"] for _, record in columns]
    lines = heading(["penalty: value and gradient", *(f"{r['case']}, {threads(count)}" for count, r in columns)])
    for name in found[0]:
        if name not in ROOFS:
            lines.append(row([NAMES.get(name, name), *(time(results.get(name)) for results in found)]))
    limits = ROOFS if details else ROOFS[:1]
    for limit in limits:
        shares = [results["add_grad_"].get(f"share_of_{limit.replace(' ', '_')}") for results in found]
        large = [record["parameters"] >= LARGE or details for _, record in columns]
        cells = [f"{100 * s['median']:.0f} %" if s and big else "" for s, big in zip(shares, large, strict=True)]
        lines.append(row([f"`add_grad_`'s bandwidth, share of a {limit}", *cells]))
    for name in OURS if details else ():
        for baseline in BASELINES:
            ratios = [results.get(name, {}).get(f"{baseline}_over_it") for results in found]
            if any(ratios):
                lines.append(row([f"{baseline} over {name}", *(spread(r) if r else "" for r in ratios)]))
    return lines


def sweep(runs: Runs, details: bool = False) -> Lines:
    """Return the times of the first run: all, or whole decades and of the large ones those in 100 tensors."""

    def is_shown(record: dict[str, Any]) -> bool:
        power = math.log10(record["parameters"])
        few = record["tensors"] <= 100 if round(power) <= 5 else record["tensors"] == 100
        return details or (abs(power - round(power)) < 0.1 and few)

    run = runs[0]
    found = [record for record in run["records"] if is_shown(record)]
    names = list(dict.fromkeys(name for record in found for name in record["results"]))
    lines = heading(["parameters", "tensors", *(NAMES.get(name, name) for name in names)])
    for r in found:
        cells = [time(r["results"].get(name), quartiles=False) for name in names]
        lines.append(row([f"{r['parameters']:,}", f"{r['tensors']:,}", *cells]))
    return lines


def anchors(runs: Runs, details: bool = False) -> Lines:
    """Return K anchors, merged and apart; then active sets and F in bfloat16 over the whole, and consolidation."""
    found = runs[0]["records"]
    names = list(found["merged"][0]["results"])
    lines = heading(["K", *(NAMES.get(name, name) for name in names), "error of the gradient", "of the value"])
    for line in found["merged"]:
        results = [line["results"][name] for name in names]
        cells = [f"{time(result, quartiles=False)} ({result['over_base']['median']:.3g})" for result in results]
        lines.append(row([str(line["anchors"]), *cells, *_errors(line["results"]["add_grad_"])]))
    lines += [
        "",
        *heading(["over the whole, F in float32", NAMES["add_grad_"], NAMES["autograd"], "error"]),
    ]
    parts = {f"`wpl.subset`, {100 * line['elements']:.3g} %": line["results"] for line in found["active"]}
    if found.get("fisher_dtype"):
        parts["F in bfloat16"] = {n: found["fisher_dtype"][f"{n}, bfloat16"] for n in ("add_grad_", "autograd")}
    for name, results in parts.items():
        cells = [f"{results[way]['over_base']['median']:.2g}" for way in ("add_grad_", "autograd")]
        lines.append(row([name, *cells, _errors(results["add_grad_"])[0]]))
    moved, share = found["consolidate"], f"{100 * found['consolidate']['active_elements']:.2g} %"
    lines += ["", *heading(["`consolidate`", "all parameters", f"{share} of them"])]
    for how in ("merge", "replace"):
        lines.append(row([how, *(time(moved[key], quartiles=details) for key in (how, f"{how}, active"))]))
    return lines


def _errors(result: dict[str, Any]) -> list[str]:
    """Render the errors of the gradient and of the value."""
    return [f"{result['relative_error'][key]:.1e}" for key in ("gradient", "value")]


def fisher(runs: Runs, details: bool = False) -> Lines:
    """Return passes and whole calls over units: a line for each workload."""
    heads = [f"{what}, {threads(run['threads'])}" for what in ("pass", "whole call") for run in runs]
    more = ["unit", "target", "pairs", "memory, MB: unit, pass, F", "error", "rules"] if details else []
    lines = heading(["Fisher / ordinary forward and backward", *heads, *more])
    for records in zip(*(run["records"] for run in runs), strict=True):
        first, cells = records[0], [spread(r["ratio"]) + "\\*" * (r["pairs"] < PAIRS) for r in records]
        cells += [
            f"{w['projected_ratio']:.3g}\\*" if w["capped"] else spread(w["ratio"])
            for w in (record["whole"] for record in records)
        ]
        if details:
            held = ", ".join(f"{first['peak_bytes'][k] / 1e6:.1f}" for k in ("unit", "fisher_pass", "one_fisher"))
            rules = ", ".join(f"{name} {count}" for name, count in first["rules"].items())
            cells += [time({"milliseconds": first["milliseconds"]["unit"]}), f"{first['target']:.2f}"]
            cells += [str(first["pairs"]), held, f"{first['relative_error']:.1e}", rules]
        lines.append(row([first["shown"], *cells]))
    return lines


def peers(runs: Runs, details: bool = False) -> Lines:
    """Return the time over the unit's and the peak memory of every library, or why it failed."""
    names = list(runs[0]["records"][0]["contenders"])
    lines = heading(["", *(NAMES.get(name, name) for name in names)])

    def shown(result: dict[str, Any]) -> str:
        if "ratio" not in result:
            error = result["error"]
            return error if error == "not installed" else f"fails: {error.partition(': ')[2]}"
        wrong = "" if result["right"] else f", **wrong** by {result['relative_error']:.1g}"
        setting = f", {result['setting']}" if details and "setting" in result else ""
        return f"{spread(result['ratio'])}, {result['peak_bytes'] / 1e6:,.3g} MB{wrong}{setting}"

    for run in runs:
        for r in run["records"]:
            cells = [shown(r["contenders"][name]) for name in names]
            lines.append(row([f"{r['shown']}, {threads(run['threads'])}", *cells]))
    return lines


def scaling(runs: Runs, details: bool = False) -> Lines:
    """Return the powers that times and memory grow with; in detail all points."""
    records = runs[-1]["records"]
    lines = heading(["", "sizes", "Fisher pass", "ordinary pass"])
    for r in records:
        kind = "time" if "milliseconds" in r["points"][0] else "peak memory"
        powers = [f"{r['name']}^{round(r['slopes'][name], 2) + 0.0:.2f}" for name in ("fisher", "unit")]
        sizes = f"{r['points'][0]['size']:,} to {r['points'][-1]['size']:,}"
        lines.append(row([f"{kind}, {r['shown']}", sizes, *powers]))
    if details:
        lines += ["", *heading(["", "size", "Fisher pass", "ordinary pass", "ratio"])]
        for r in records:
            for p in r["points"]:
                cells = [f"{p['peak_bytes'][n] / 1e6:.3f} MB" for n in ("fisher", "unit")] if "peak_bytes" in p else [
                    time({"milliseconds": p["milliseconds"][n]}) for n in ("fisher", "unit")
                ]  # fmt: skip
                lines.append(row([r["name"], str(p["size"]), *cells, spread(p["ratio"]) if "ratio" in p else ""]))
    return lines


def rule(record: dict[str, Any]) -> Lines:
    """Return a line for the rules that serve a case and one without them, and which rule served which parameter."""
    lines = heading(
        [record["case"], "pass / unit", "pairs", "unit", "pass", "error", "memory over the unit's", "served"]
    )
    for name, r in ((name, record[name]) for name in ("on", "off") if name in record):
        times = [time({"milliseconds": r["milliseconds"][what]}) for what in ("unit", "fisher")]
        memory = f"{r['extra_bytes'] / 1e6:.2f} MB (F: {r['one_fisher_bytes'] / 1e6:.2f})"
        served = ", ".join(f"{p}: {' and '.join(rules) or 'none'}" for p, rules in r["rules"].items())
        lines.append(
            row([name, spread(r["ratio"]), str(r["pairs"]), *times, f"{r['relative_error']:.1e}", memory, served])
        )
    return lines


TABLES: dict[str, Callable[..., Lines]] = {
    "penalty": penalty, "sweep": sweep, "anchors": anchors, "fisher": fisher, "peers": peers, "scaling": scaling,
}  # fmt: skip


def read(name: str) -> dict[str, Any] | None:
    """Return a record of ``results``, None where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def gpu_record() -> dict[str, Any] | None:
    """Return the last of the records ``gpu_*.json``, if there is one; rehearsals do not count."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("gpu_*.json"))]
    return next((record for record in reversed(found) if not record["quick"]), None)


def sections() -> Iterator[tuple[str, Lines]]:
    """Yield the README's sections: their names and lines."""
    if record := read("two_models_mnist"):
        yield "two_models", [*image("two_models_mnist.png", CURVES), two_models.markdown(record)]
    found = {name: read(f"{name}_cpu") or {} for name in ("penalty", "fisher", "anchors", "peers", "scaling")}
    where = found["penalty"]
    place = f"{where['hardware']['cpu']}, torch {where['versions']['torch']}"
    words = f"{place}; medians [quartiles] of interleaved runs, from `python -m benchmarks`."
    yield "speed", [words, "", *penalty(where["penalty"]), "", *fisher(found["fisher"]["fisher"])]
    yield "gpu", [gpu_section(gpu_record()) or UNMEASURED]
    sweeps = "Time of a penalty against the number of parameters, by number of tensors"
    yield "sweep", [*image("penalty_cpu.png", sweeps), *sweep(where["sweep"])]
    yield "anchors", anchors(found["anchors"]["anchors"])
    libraries = "Time and peak memory of libraries that compute the same Fisher"
    yield "peers", [*image("peers_cpu.png", libraries), *peers(found["peers"]["peers"])]
    grown = "Time and memory against batch size, length, width, classes and samples"
    yield "scaling", [*image("scaling_cpu.png", grown), *scaling(found["scaling"]["scaling"])]


def fill(text: str, section: str, content: str) -> str:
    """Replace what stands between a section's markers.

    Raises:
        ValueError: if the markers are missing.
    """
    begin, end = f"<!-- {section} begin -->", f"<!-- {section} end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the README lacks the markers of {section!r}")
    return "".join((head, begin, "\n", content, "\n" if content else "", end, tail))


def render() -> str:
    """Return the README with its sections filled in."""
    text = (ROOT / "README.md").read_text()
    for name, lines in sections():
        text = fill(text, name, "\n".join(lines))
    return text
