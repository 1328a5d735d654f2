"""What tasks and scores are called in the table and the figures of :mod:`..row.report`."""

from __future__ import annotations

from functools import partial

from ..row import report
from ..row.arms import Row

NOTES = """Test accuracies in % at the end; ±: half the 95 % interval of the mean over 4 seeds or more, of differences
paired by seed. Forgetting: a task's best accuracy so far minus that at the end, without the last task. New tasks: the
accuracy of tasks but the first right after they were learnt. Good: the alphas whose validation accuracy is within 2
points of the best; < or >: to the grid's end."""

ROW = Row(
    arms={
        "none": "no penalty",
        "frozen": "layers frozen after the first task",
        "l2": "L2 anchor (F = 1)",
        "mc": "Fisher, labels drawn from the model",
        "exact": "Fisher, exact over classes",
        "empirical": "Fisher, empirical",
        "squared": "batch-squared F, batches of",
        "joint": "all tasks at once",
    },
    name="Permuted pixels",
    title="One network learns {n} tasks in a row: permuted pixels",
    key="accuracy",
    words="test accuracy (%)",
    task="task",
    parts="layers",
    versus="above L2",
    unit=" %",
    scale=100.0,
    better=1,
    digits=1,
    within=2.0,
    limits=(0, 101),
)

tables = partial(report.tables, ROW)
figures = partial(report.figures, ROW)
