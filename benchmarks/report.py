"""Tables of what was measured, in Markdown: printed after a run, in the README and in the documentation.

Every table takes the runs of one part of a record, one for each number of threads; ``details`` adds what the console
shows and the pages leave out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .plumbing.markdown import spread, table, threads, time

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
SHOWN = 2  # cases of the penalty that pages show
PAIRS = 30  # below so many, a ratio is marked

Runs = Sequence[dict[str, Any]]
Lines = list[str]


def on(what: str, run: Mapping[str, Any]) -> str:
    """Add a run's number of threads; a GPU's has none."""
    return f"{what}, {threads(run['threads'])}" if "threads" in run else what


def penalty(runs: Runs, details: bool = False) -> Lines:
    """Return a column for each case and number of threads, a line for each way."""
    columns = [
        (run, run["records"][case]) for case in range(len(runs[0]["records"]) if details else SHOWN) for run in runs
    ]
    found = [record["results"] for _, record in columns]
    ways = [way for way in found[0] if way not in ROOFS]
    rows = [[NAMES[way], *(time(r[way]["milliseconds"]) for r in found)] for way in ways]
    for roof in ROOFS if details else ROOFS[:1]:
        shares = [r["add_grad_"].get(f"share_of_{roof.replace(' ', '_')}") for r in found]
        large = [details or record["parameters"] >= LARGE for _, record in columns]
        cells = [f"{100 * s['median']:.0f} %" if s and big else "" for s, big in zip(shares, large, strict=True)]
        rows.append([f"`add_grad_`'s bandwidth, share of a {roof}", *cells])
    for way in OURS if details else ():
        rows += [
            [f"{baseline} over {way}", *(spread(r[way].get(f"{baseline}_over_it")) for r in found)]
            for baseline in BASELINES
            if baseline in ways
        ]
    heads = [on(record["case"], run) for run, record in columns]
    return table(["penalty: value and gradient", *heads], rows)


def sweep(runs: Runs, details: bool = False) -> Lines:
    """Return the times of the first run: all, or whole decades and of the large ones those in 100 tensors."""

    def is_shown(record: Mapping[str, Any]) -> bool:
        power = math.log10(record["parameters"])
        few = record["tensors"] <= 100 if round(power) <= 5 else record["tensors"] == 100
        return details or (abs(power - round(power)) < 0.1 and few)

    found = [record for record in runs[0]["records"] if is_shown(record)]
    names = list(dict.fromkeys(name for record in found for name in record["results"]))
    rows = [
        [
            *(f"{r[key]:,}" for key in ("parameters", "tensors")),
            *(time(r["results"].get(name, {}).get("milliseconds"), quartiles=False) for name in names),
        ]
        for r in found
    ]
    return table(["parameters", "tensors", *(NAMES.get(name, name) for name in names)], rows)


def anchors(runs: Runs, details: bool = False) -> Lines:
    """Return K anchors, merged and apart; then active sets and F in bfloat16 over the whole, and consolidation."""
    found, ways = runs[0]["records"], ("add_grad_", "autograd")

    def error(result: Mapping[str, Any], key: str = "gradient") -> str:
        return f"{result['relative_error'][key]:.1e}"

    names, rows = list(found["merged"][0]["results"]), []
    for line in found["merged"]:
        results = [line["results"][name] for name in names]
        cells = [f"{time(r['milliseconds'], quartiles=False)} ({r['over_base']['median']:.3g})" for r in results]
        rows.append([str(line["anchors"]), *cells, error(results[0]), error(results[0], "value")])
    lines = table(["K", *(NAMES[name] for name in names), "error of the gradient", "of the value"], rows)
    parts = {f"`wpl.subset`, {100 * line['elements']:.3g} %": line["results"] for line in found["active"]}
    parts["F in bfloat16"] = {way: found["fisher_dtype"][f"{way}, bfloat16"] for way in ways}
    rows = [
        [name, *(f"{r[way]['over_base']['median']:.2g}" for way in ways), error(r["add_grad_"])]
        for name, r in parts.items()
    ]
    lines += ["", *table(["over the whole, F in float32", *(NAMES[way] for way in ways), "error"], rows)]
    moved = found["consolidate"]
    share = f"{100 * moved['active_elements']:.2g} % of them"
    rows = [
        [how, *(time(moved[key]["milliseconds"], details) for key in (how, f"{how}, active"))]
        for how in ("merge", "replace")
    ]
    return [*lines, "", *table(["`consolidate`", "all parameters", share], rows)]


def errors_of(record: Mapping[str, Any]) -> str:
    """Render the error relative to a parameter's largest entry; in lower precisions the whole's, and that of a loop."""
    wrong = " **wrong**" * (not record["right"])
    if "loop" in record["errors"]:
        ours, loop = (f"{record['errors'][key]['whole']:.1e}" for key in ("fisher", "loop"))
        return f"{ours} (loop {loop}){wrong}"
    return f"{record['relative_error']:.1e}{wrong}"


def fisher(runs: Runs, details: bool = False) -> Lines:
    """Return passes and whole calls over units: a line for each workload."""
    rows = []
    for records in zip(*(run["records"] for run in runs), strict=True):
        first = records[0]
        cells = [spread(r["ratio"]) + "\\*" * (r["pairs"] < PAIRS) for r in records]
        for whole in (record["whole"] for record in records):
            cells.append(f"{whole['projected_ratio']:.3g}\\*" if whole["capped"] else spread(whole["ratio"]))
        if details:
            held = ", ".join(f"{first['peak_bytes'][k] / 1e6:.1f}" for k in ("unit", "fisher_pass", "one_fisher"))
            rules = ", ".join(f"{name} {count}" for name, count in first["rules"].items())
            cells += [f"{first['target']:.2f}", time(first["milliseconds"]["unit"]), str(first["pairs"]), held]
            cells += [errors_of(first), rules]
        rows.append([first["shown"], *cells])
    heads = [on(what, run) for what in ("pass", "whole call") for run in runs]
    heads += ["target", "unit", "pairs", "memory, MB: unit, pass, F", "error", "rules"] if details else []
    return table(["Fisher / ordinary forward and backward", *heads], rows)


def peers(runs: Runs, details: bool = False) -> Lines:
    """Return the time over the unit's and the peak memory of every library, or why it failed."""

    def shown(result: Mapping[str, Any]) -> str:
        if "ratio" not in result:
            error = result["error"]
            return error if error == "not installed" else f"fails: {error.partition(': ')[2]}"
        wrong = "" if result["right"] else f", **wrong** by {result['relative_error']:.1g}"
        setting = f", {result['setting']}" if details and "setting" in result else ""
        return f"{spread(result['ratio'])}, {result['peak_bytes'] / 1e6:,.3g} MB{wrong}{setting}"

    names = list(runs[0]["records"][0]["contenders"])
    rows = [
        [on(r["shown"], run), *(shown(r["contenders"][name]) for name in names)] for run in runs for r in run["records"]
    ]
    return table(["", *(NAMES.get(name, name) for name in names)], rows)


def beside(place: str, runs: Runs, penalties: Runs) -> Lines:
    """Return one processor's short table: times over the unit's of every library, and the penalty in one line."""
    run = runs[-1]
    names = list(run["records"][0]["contenders"])

    def shown(result: Mapping[str, Any]) -> str:
        if "ratio" not in result:
            return "fails" if result["error"] != "not installed" else "-"
        return f"{result['ratio']['median']:.2g}" if result["right"] else "wrong"

    heads = [f"{place}, {threads(run['threads'])}", *(NAMES.get(name, name) for name in names)]
    lines = table(heads, [[r["shown"], *(shown(r["contenders"][n]) for n in names)] for r in run["records"]])
    if penalties:
        large = penalties[0]["records"][0]
        ways = (way for way in ("add_grad_", "compile", "foreach, value", "eager") if way in large["results"])
        times = (f"{NAMES[way]} {time(large['results'][way]['milliseconds'], quartiles=False)}" for way in ways)
        words = f"The penalty's value and gradient, {large['case']}, {threads(penalties[0]['threads'])}"
        lines += ["", f"{words}: {', '.join(times)}."]
    return lines


def scaling(runs: Runs, details: bool = False) -> Lines:
    """Return the powers that times and memory grow with; in detail all points."""
    records, ways, rows, points = runs[-1]["records"], ("fisher", "unit"), [], []
    for r in records:
        kind = "time" if "milliseconds" in r["points"][0] else "peak memory"
        powers = [f"{r['name']}^{round(r['slopes'][way], 2) + 0.0:.2f}" for way in ways]
        sizes = f"{r['points'][0]['size']:,} to {r['points'][-1]['size']:,}"
        rows.append([f"{kind}, {r['shown']}", sizes, *powers])
        for p in r["points"]:
            timed = "milliseconds" in p
            cells = [time(p["milliseconds"][w]) if timed else f"{p['peak_bytes'][w] / 1e6:.3f} MB" for w in ways]
            points.append([r["name"], str(p["size"]), *cells, spread(p.get("ratio"))])
    lines = table(["", "sizes", "Fisher pass", "ordinary pass"], rows)
    return [*lines, "", *table(["", "size", "Fisher pass", "ordinary pass", "ratio"], points)] if details else lines


def rule(runs: Runs, details: bool = False) -> Lines:
    """Return a line with the rules that serve a case and one without, and which rule served which parameter."""
    rows = []
    for run in runs:
        for state in ("on", "off"):
            if r := run["records"].get(state):
                memory = f"{r['extra_bytes'] / 1e6:.2f} MB (F: {r['one_fisher_bytes'] / 1e6:.2f})"
                served = ", ".join(f"{p}: {' and '.join(rules) or 'none'}" for p, rules in r["rules"].items())
                times = [time(r["milliseconds"][what]) for what in ("unit", "fisher")]
                cells = [str(r["pairs"]), *times, f"{r['relative_error']:.1e}", memory, served]
                rows.append([on(state, run), spread(r["ratio"]), *cells])
    heads = ("pass / unit", "pairs", "unit", "pass", "error", "memory over the unit's", "served")
    return table([runs[0]["records"]["case"], *heads], rows)


def integrations(runs: Runs, details: bool = False) -> Lines:
    """Return a line for each package's training step and number of threads, then the Fisher of a Trainer's data."""
    rows = [
        [
            on(step["case"], run),
            *(time(step["milliseconds"][way]) for way in ("without", "callback", "loop")),
            *(spread(step[key]) for key in ("callback_over_without", "loop_over_callback")),
            time(step["penalty"]["milliseconds"]),
            f"{100 * step['penalty']['over_without']['median']:.1f} %",
            time(step["penalty"]["roof_milliseconds"]),
        ]
        for run in runs
        for step in run["records"]["steps"]
    ]
    heads = ["training step", "without", "callback", "loop in the loss", "callback / without", "loop / callback"]
    heads += ["the penalty's pass", "of a step", "roof: a triad of as many bytes"]
    lines = table(heads, rows)
    found = [(run, run["records"]["fisher"]) for run in runs if run["records"]["fisher"]]
    if found:
        rows = [
            [
                on(record["case"], run),
                *(time(record["milliseconds"][way]) for way in ("fisher", "evaluation")),
                *(spread(record[f"{key}_over_evaluation"]) for key in ("fisher", "unverified", "later_batch")),
            ]
            for run, record in found
        ]
        heads = [
            "the data's Fisher",
            "`trainer_fisher`",
            "`trainer.evaluate`",
            "over it",
            "over it, verify=False",
            "a later batch over one",
        ]
        lines += ["", *table(heads, rows)]
    return [*lines, *(f"missing: {text}" for text in runs[0]["records"]["missing"])]


TABLES: dict[str, Callable[[Runs, bool], Lines]] = {
    "penalty": penalty, "sweep": sweep, "anchors": anchors, "fisher": fisher, "peers": peers, "scaling": scaling,
    "rule": rule, "integrations": integrations,
}  # fmt: skip
