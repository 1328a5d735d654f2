"""What domains and scores are called in the table and the figures of :mod:`..row.report`; the table of alphas."""

from __future__ import annotations

from functools import partial
from typing import Any

from ..harness.tables import Table
from ..row import report
from ..row.arms import Row

NOTES = """Bits per byte of held-out text at the end, less is better; ±: half the 95 % interval of the mean over 4 seeds
or more, of differences paired by seed. Forgetting: a domain's bits at the end minus the fewest so far, without the last
domain. New domains: the bits of domains but the first right after they were learnt. Below L2: by how many bits fewer
than the L2 anchor. Good: the alphas whose validation bits are within 0.02 of the best; < or >: to the grid's end."""

ROW = Row(
    arms={
        "none": "no penalty",
        "frozen": "blocks' adapters frozen after the first domain",
        "l2": "L2 anchor (F = 1)",
        "mc": "Fisher, labels drawn from the model",
        "empirical": "Fisher, empirical",
        "squared": "batch-squared F, batches of",
        "joint": "all domains at once",
    },
    name="LoRA in a row of domains",
    title="A language model's adapters learn {n} domains in a row",
    key="bits",
    words="bits per byte of held-out text",
    task="domain",
    parts="blocks",
    versus="below L2",
    unit=" bits",
    scale=1.0,
    better=-1,
    digits=3,
    within=0.02,
)

figures = partial(report.figures, ROW)


def tables(record: dict[str, Any]) -> dict[str, Table]:
    """Return the table of arms, and that of alphas."""
    rows = []
    for arm, mean in record["mean_f"].items():
        found = record["arms"][arm]
        product = found["setting"] * mean
        rows.append([ROW.title_of(arm), f"{mean:.3g}", f"{found['setting']:g}", f"{product:.3g}"])
    columns = ("", "mean of F, first domain", "best alpha", "best alpha times mean of F")
    return {**report.tables(ROW, record), "alphas": Table(columns, rows)}
