"""The README's section about a GPU, from the record of ``make gpu-bench``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .kernel_case import OURS
from .markdown import heading, image, row

KERNELS = ("value", "value and gradient", "add_grad_")
LEAST = 10**6  # parameters from which bandwidth is what counts
PEERS = {"torch.func": "`vmap(grad)`", "loop": "one-sample loop"}
Found = Mapping[str, Any]


def section(record: Found | None) -> str:
    """Render a record, or nothing where there is none."""
    if not record:
        return ""
    parts: dict[str, Found] = {name: part["cases"] for name, part in record["parts"].items()}
    place = next((part["place"] for part in record["parts"].values() if "place" in part), None)
    if place is None:
        return ""
    tables = (
        _fisher(parts.get("fisher", {})),
        _linear(parts.get("linear", {})),
        _layers(parts.get("layers", {})),
        _penalty(parts.get("penalty", {}), parts.get("compiled", {})),
        _peers(parts.get("peers", {})),
    )
    blocks = [[_place(record, place, parts.get("roofs", {}))], *(list(table) for table in tables)]
    blocks.append(list(_unmeasured(record)))
    picture = image("gpu.png", "Shares of cuBLAS's rate and of the copy's bandwidth")
    return "\n\n".join("\n".join(lines) for lines in [*([picture[:1]] if picture else []), *blocks] if lines)


def place_of(record: Found) -> str:
    """Return the GPU, or else the CPU, and the version of torch."""
    place = next(part["place"] for part in record["parts"].values() if "place" in part)
    return f"{place['hardware'].get('gpu') or place['hardware']['cpu']}, torch {place['versions']['torch']}"


def _place(record: Found, place: Found, roofs: Found) -> str:
    """Render where and with what, and the roofs."""
    versions = place["versions"]
    words = f"{place['hardware'].get('gpu') or place['hardware']['cpu']}"
    words += "".join(f", {name} {versions[name]}" for name in ("driver", "torch", "triton") if versions.get(name))
    words += "; `make gpu-bench`, medians [quartiles] of interleaved runs, TF32 off unless named."
    if "memory" in roofs:
        rates = ", ".join(
            f"{name} {roofs['memory'][name]['gigabytes_per_second']:,.0f} GB/s" for name in ("copy", "triad")
        )
        words += f" Roofs of the same run: {rates}"
        squares = [
            f"{name.split()[0]} {found['teraflops_per_second']:,.0f} TFLOP/s"
            for name, found in roofs.items()
            if "teraflops_per_second" in found
        ]
        words += f"; products of square matrices: {', '.join(squares)}." if squares else "."
    return words + (" **A rehearsal with tiny sizes: no measurement.**" if record["quick"] else "")


def _spread(ratio: Found, percent: bool = False) -> str:
    """Render a ratio with its quartiles."""
    factor, unit = (100, " %") if percent else (1, "")
    low, mid, high = (f"{factor * ratio[key]:.3g}" for key in ("q1", "median", "q3"))
    return f"{mid}{unit} [{low}, {high}]"


def _fisher(found: Found) -> Iterator[str]:
    """Render passes and whole calls over ordinary passes."""
    if not found:
        return
    yield from heading(
        [
            "Fisher / ordinary forward and backward",
            "ordinary",
            "pass",
            "whole call",
            "memory: ordinary, pass, F",
            "error",
        ]
    )
    for r in found.values():
        whole = r["whole"]
        call = f"{whole['projected_ratio']:.3g}\\*" if whole["capped"] else _spread(whole["ratio"])
        held = ", ".join(f"{r['peak_bytes'][key] / 1e9:.2g}" for key in ("unit", "fisher_pass", "one_fisher"))
        error = f"{r['errors']['fisher']['whole']:.1e}"
        error += f" (loop {r['errors']['loop']['whole']:.1e})" if "loop" in r["errors"] else ""
        unit = f"{r['milliseconds']['unit']['median']:.3g} ms"
        wrong = "" if r["right"] else " **wrong**"
        yield row([r["shown"] + wrong, unit, _spread(r["ratio"]), call, f"{held} GB", error])
    yield ""
    yield (
        "Errors are those of the whole model's Fisher, relative to its norm, against a float64 loop over samples; "
        "beside them those of a loop in the same precision. Memory is the peak beyond the model."
    )


def _linear(found: Found) -> Iterator[str]:
    """Render the linear layers' kernel beside the plain product."""
    if not found:
        return
    yield from heading(
        ["`fisher_linear_`: layer", "time", "TFLOP/s", "share of cuBLAS's plain `G^T A`", "goal", "error"]
    )
    for name, r in found.items():
        goal = f"{100 * r['target']:.0f} %" if r["target"] else ""
        error = f"{r['relative_error']['fisher']['norm']:.0e}" + ("" if r["right"] else " **wrong**")
        cells = [f"N={r['n']}, T={r['t']}: {name}", _time(r), f"{r['teraflops_per_second']:.0f}"]
        yield row([*cells, _spread(r["share_of_plain"], percent=True), goal, error])


def _layers(found: Found) -> Iterator[str]:
    """Render the other kernels beside PyTorch's plain gradients."""
    if not found:
        return
    yield from heading(
        ["other Fisher kernels", "time", "over PyTorch's plain gradient", "share of the copy's bandwidth"]
    )
    for name, r in found.items():
        over = 1 / r["times"]["plain gradient"]["over_ours"]["median"]
        yield row([name, _time(r), f"{over:.2g}", f"{100 * r['share_of_copy']['median']:.0f} %"])


def _time(r: Found) -> str:
    """Render the time of our kernel."""
    return f"{1e3 * r['times'][OURS]['milliseconds']['median']:.3g} µs"


def _penalty(found: Found, compiled: Found) -> Iterator[str]:
    """Render the penalty's shares of the copy, and what others take."""
    if not found:
        return
    heads = [f"{name}, share of the copy" for name in ("value", "value and gradient", "`add_grad_`")]
    yield from heading(["penalty", *heads, "`add_grad_`", "`wpl().backward()`", "eager", "foreach, gradient alone"])
    for name, r in found.items():
        results = r["results"]
        large = r["parameters"] >= LEAST
        shares = [f"{100 * results[k]['share_of_copy']['median']:.0f} %" if large else "" for k in KERNELS]
        ours = results["add_grad_"]["milliseconds"]["median"]
        time = f"{ours:.3g} ms" if ours >= 1 else f"{1e3 * ours:.3g} µs"
        others = [
            f"{results[way]['over_add_grad_']['median']:.2g}x" if way in results else "-"
            for way in ("autograd", "eager", "foreach")
        ]
        yield row([name, *shares, time, *others])
    for name, r in compiled.items():
        yield ""
        yield f"torch.compile takes {r['over_add_grad_']['median']:.2g} times as long as `add_grad_` ({name})."


def _peers(found: Found) -> Iterator[str]:
    """Render other libraries' time over that of an ordinary pass."""
    if not found:
        return
    ways = list(next(iter(found.values()))["contenders"])
    yield from heading(["Fisher of one batch / ordinary pass", *(PEERS.get(way, way) for way in ways)])
    for r in found.values():
        cells = []
        for way in ways:
            result = r["contenders"][way]
            if "ratio" in result:
                wrong = "" if result["right"] else ", **wrong**"
                cells.append(f"{result['ratio']['median']:.3g}, {result['peak_bytes'] / 1e9:.2g} GB{wrong}")
            else:
                cells.append(result["error"].partition(":")[0])
        yield row([r["shown"], *cells])


def _unmeasured(record: Found) -> Iterator[str]:
    """Yield a sentence about what failed or was left out, so that no table hides it."""
    failed = [f"{part}: {case}" for part, found in record["parts"].items() for case in found["errors"]]
    late = [f"{part}: {case}" for part, found in record["parts"].items() for case in found["left_out"] if case != "all"]
    if failed:
        yield f"Failed or wrong in this run: {'; '.join(failed)}."
    if late:
        yield f"Left out for lack of time: {'; '.join(late)}."
