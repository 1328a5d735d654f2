"""The Fisher pass on all workloads, with weights and inputs that no run before had: what a GPU is measured with."""

from __future__ import annotations

import os
from functools import partial

import torch

from .fisher import KNOWN, measure_workload
from .plumbing.parts import Cases, WrongCaseError
from .timing import Spread

#: What is measured on a GPU, what matters most first: the record is of as many as there is time for.
ORDER = ("gpt2", "mlp", "resnet50", "lstm", "decoder", "cnn", "gpt2_untied", "cell", "gpt2_autocast", "resnet50_fp32")
ORDER += ("rnn", "tied", "resnet50_tf32")


def case(device: torch.device, quick: bool, name: str) -> dict:
    """Measure one workload with weights and inputs that no run before had."""
    seed = int.from_bytes(os.urandom(4), "little")
    rounds, seconds = (4, 0.2) if quick else (40, 3.0)
    record = {"seed": seed, **measure_workload(KNOWN[name], device, quick, rounds, seconds, seed, strict=False)}
    if not record["right"]:
        raise WrongCaseError(f"{name}: {record['errors']}", record)
    return record


def cases(device: torch.device, quick: bool) -> Cases:
    """Return what is measured on a GPU."""
    return {name: partial(case, device, quick, name) for name in ORDER}


def table(found: dict) -> str:
    """Return a narrow table of the cases."""
    head = (
        f"{'unit ms':>9}{'pass ms':>9}{'pass/unit':>22}{'goal':>6}{'call/units':>11}{'GB: unit':>9}{'pass':>6}{'F':>6}"
    )
    lines = [f"{'Fisher pass':15}{head}  error (loop)"]
    for name, r in found.items():
        unit, fisher = (r["milliseconds"][k]["median"] for k in ("unit", "fisher"))
        held = "".join(
            f"{r['peak_bytes'][k] / 1e9:{w}.2f}" for k, w in (("unit", 9), ("fisher_pass", 6), ("one_fisher", 6))
        )
        whole = r["whole"]["projected_ratio"] if r["whole"]["capped"] else r["whole"]["ratio"]["median"]
        loop = f" ({r['errors']['loop']['whole']:.1e})" if "loop" in r["errors"] else ""
        slow = f" SLOW: {len(r['slow'])}" if r["slow"] else ""
        lines.append(
            f"{name:15}{unit:9.2f}{fisher:9.2f}{Spread(**r['ratio'])!s:>22}{r['target']:6.2f}{whole:11.3f}{held}"
            f"  {r['errors']['fisher']['whole']:.1e}{loop}{'' if r['right'] else ' WRONG'}{slow}"
        )
    return "\n".join(lines)
