"""Is a loss -log p of the labels that are drawn for it? How it reads them is found out, or what differs is said.

The gradient of -log p by the logits is known: for each label that counts, p - e_y in the label's row (categorical) or
p - y (bernoulli), mean - y (gaussian). So the loss is evaluated on logits and labels of our own: its gradient tells
which row each label belongs to (shifted or not), which labels do not count (ignored ones), and whether anything else is
in it (label smoothing, class weights, masked classes, a missing 1/2). That costs two evaluations of the loss, once.
What shows on some outputs alone is for ``loss_check.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .alignment import alignments
from .loss_probe import Evaluation, Probe
from .reading import Reading, readings
from .row_scales import MismatchError, RowScales

#: What finding a class to ignore may cost: evaluations of the loss, and logits in all of them.
MOST_EVALUATIONS, MOST_ELEMENTS = 64, 1 << 22

#: What makes a loss another one, on all logits and labels first, on some alone last.
_REASONS = {
    "categorical": "label smoothing, class weights, a temperature, a focal or margin term, classes that are masked "
    "inside the loss, logits that are adjusted by a prior (let the model add it), probabilities where the likelihood "
    "takes logits, another likelihood's loss (likelihood='gaussian' for regression, 'bernoulli' for yes-or-no labels); "
    "where it shows on some outputs or labels alone, logits, probabilities or losses that are clamped, or examples "
    "that count more or less",
    "bernoulli": "pos_weight, a mean over the labels, probabilities where the likelihood takes logits; where it shows "
    "on some outputs or labels alone, logits, probabilities or losses that are clamped, or labels that count more or "
    "less",
    "gaussian": "a missing 1/2, a mean over the dimensions, another variance than 1; where it shows on some outputs or "
    "labels alone, means, residuals or losses that are clamped, as in Huber's loss, or outliers that count less",
}


def fit(
    likelihood: str,
    loss_fn: Callable[[Any, Any], Tensor],
    outputs: Any,
    targets: Any,
    parameters: Sequence[Tensor] = (),
    soft: bool = False,
) -> Reading | None:
    """Find how a loss reads outputs and labels, such that it is -log p of the labels.

    Args:
        likelihood: "categorical", "bernoulli" or "gaussian".
        loss_fn: the per-sample loss.
        outputs: the model's outputs for a batch; their shapes count, not their values.
        targets: the batch's targets.
        parameters: the watched parameters, on which the loss must not depend by itself.
        soft: bernoulli: the loss must take labels between 0 and 1, too.

    Returns:
        The reading, or None if this batch cannot tell (no label of it counts).

    Raises:
        ValueError: if the loss is not -log p for any reading, with what differs and what to do.
    """
    failures: list[tuple[Exception, str]] = []
    most_classes = sys.maxsize
    for reading in readings(likelihood, outputs, targets):
        if reading.n_classes(reading.logits.get(outputs)) > most_classes:
            continue  # labels that the loss may not take: on a GPU, that would end the process
        probe = Probe(reading, loss_fn, outputs, targets, parameters, soft)
        if not probe.logits.numel():
            return None
        evaluation = None
        try:
            evaluation = probe.own(0)
            return _aligned(probe, evaluation)
        except Exception as error:
            failures.append((error, "" if evaluation is None else _values(probe, evaluation)))
            if isinstance(error, MismatchError) and reading.categorical:
                most_classes = min(most_classes, reading.n_classes(probe.logits))
    cause, values = min(failures, key=lambda found: 2 * (not isinstance(found[0], MismatchError)) + (not found[1]))
    if not isinstance(cause, MismatchError):
        if str(cause).startswith("losses must"):
            raise cause
        raise ValueError(
            f"loss_fn could not be evaluated on targets drawn for likelihood={likelihood!r}: "
            f"{type(cause).__name__}: {str(cause).rstrip('.')}. If the loss takes other targets, "
            "or a part of the classes alone, pass likelihood= a sampler, (outputs, generator) -> targets, or use "
            "fisher_type='empirical'"
        ) from cause
    raise ValueError(refusal(likelihood, cause, values)) from cause


def refusal(likelihood: str, cause: MismatchError, values: str, batch: int = 0) -> str:
    """Say that a loss is not -log p, why, and what to do.

    Args:
        likelihood: the likelihood.
        cause: what differs, if that is known.
        values: a sentence with numbers, or nothing.
        batch: where it was seen; 0: on logits and labels of our own.
    """
    where = f" in batch {batch}" if batch else ""
    what = f" ({cause})" if str(cause) else ""
    return (
        f"loss_fn is not -log p of targets drawn for likelihood={likelihood!r}{where}, nor its mean over tokens{what}: "
        f"{values}Likely reasons: {_REASONS[likelihood]}. Use a loss that is -log p (see "
        "wplfast.losses), pass likelihood= a sampler, (outputs, generator) -> targets, that draws from what the loss "
        "describes, or use fisher_type='empirical'"
    )


def _aligned(probe: Probe, own: Evaluation) -> Reading | None:
    """Find which row each label belongs to, and which labels do not count."""
    first: MismatchError | None = None
    second: Evaluation | None = None
    for alignment in alignments(probe.rows, own.labels.shape):
        reading = replace(probe.reading, alignment=alignment)
        try:
            found = [probe.scales(own, reading)]
            second = second or probe.second()
            found.append(probe.scales(second, reading))
            used = (found[0].scales != 0) | (found[1].scales != 0)
            if not bool(used.any()):
                if bool((found[0].known & probe.ever_used(reading)).any()):
                    raise MismatchError("whether a label counts depends on the logits")
                return None
            reading = replace(reading, normalised=probe.normalised)
            return _with_ignored(probe, reading, found, used)
        except MismatchError as error:
            first = error if first is None or not str(first) else first
    raise first or MismatchError("")


def _with_ignored(probe: Probe, reading: Reading, found: list[RowScales], used: Tensor) -> Reading:
    """Find a label within the likelihood's range that the loss ignores: its row is used with another label.

    Args:
        probe: the probe.
        reading: the reading so far.
        found: what two evaluations gave.
        used: which rows count with some label.
    """
    n_classes = reading.n_classes(probe.logits)
    if reading.categorical:
        tried = torch.zeros(n_classes, dtype=torch.bool, device=used.device)
        budget = min(MOST_EVALUATIONS, MOST_ELEMENTS // max(1, probe.logits.numel()))
        for evaluation in range(2 + budget):
            if evaluation >= 2:  # classes that neither labels of our own nor the given ones had
                untried = (~tried).nonzero()[:, 0]
                if not len(untried):
                    break
                labels = torch.zeros_like(used, dtype=torch.int64)
                labels[used] = untried[torch.arange(int(used.sum()), device=used.device) % len(untried)]
                found.append(probe.scales(probe.of_rows(labels, reading), reading))
            rows = found[evaluation]
            tried[rows.labels[rows.known & used]] = True
        reading = replace(reading, tried=tried)
    missing = [rows.labels[rows.known & used & (rows.scales == 0)] for rows in found]
    ignored = torch.cat(missing).unique()
    if not len(ignored):
        return reading
    value = ignored[0].item()
    if len(ignored) > 1 or any(bool((rows.labels[rows.scales != 0] == value).any()) for rows in found):
        shown = ", ".join(f"{v:g}" for v in ignored[:4].tolist())
        raise MismatchError(f"whether labels such as {shown} count depends on more than one label to ignore")
    if reading.likelihood == "bernoulli":
        raise MismatchError(f"the loss does not count the label {value:g}")
    return replace(reading, ignored=value)


def _values(probe: Probe, evaluation: Evaluation) -> str:
    """Say what the loss is for a sample, and what -log p is."""
    losses, n_samples = evaluation.losses.detach().double(), len(evaluation.losses)
    shape = probe.reading.alignment.row_shape(probe.rows, evaluation.labels.shape)
    known = probe.reading.counts(evaluation.labels, probe.reading.n_classes(probe.logits))
    if evaluation.labels.shape != shape or n_samples == 0 or shape[0] != n_samples or not bool(known.any()):
        return ""
    labels = evaluation.labels
    if probe.reading.categorical:
        rows = -probe.base.log_softmax(0)[labels.clamp(0, len(probe.base) - 1)]
    else:
        mean = probe.base.reshape(shape)
        distance = (mean - labels).square() / 2
        rows = (
            torch.nn.functional.softplus(mean) - mean * labels if probe.reading.likelihood == "bernoulli" else distance
        )
    expected = torch.where(known, rows, 0).reshape(n_samples, -1).sum(1)
    worst = int((losses - expected).abs().argmax())
    return (
        f"for sample {worst} of a test with random logits and labels the loss is {float(losses[worst]):.5g}, -log p is "
        f"{float(expected[worst]):.5g}. "
    )
