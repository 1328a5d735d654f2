"""``fisher_diagonal``: the Fisher of a model over a data set, in one call."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .accumulate import FisherAccumulator
from .batches import Batch, Unpack
from .fisher import Fisher
from .losses import logits_of
from .parameters import Params, device_of
from .sampling import Likelihood, draw
from .version import __version__

LossFn = Callable[[Any, Any], Tensor]


def fisher_diagonal(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFn,
    *,
    params: Params | None = None,
    unpack: Unpack | None = None,
    fisher_type: Literal["empirical", "mc", "exact"] = "empirical",
    likelihood: Likelihood = "categorical",
    mc_samples: int = 1,
    max_samples: int | None = None,
    generator: torch.Generator | None = None,
    train: bool = False,
    with_grad: bool = False,
    verify: bool = True,
    on_nonfinite: Literal["raise", "skip"] = "raise",
    progress: bool = False,
) -> Fisher:
    """Estimate the diagonal Fisher information, a mean over samples of squared per-sample gradients.

    ``F_i = 1/N sum_n (d loss_n / d theta_i)^2``, exact for every model whose samples do not depend on each other, on one
    scale whatever the batch size. The pass costs about one ordinary backward pass per batch.

    Args:
        model: the module. Its parameters, flags, gradients and the RNG state are afterwards what they were.
        data: yields ``(inputs, targets)``, ``(inputs, targets, weights)`` or a dict with ``labels``; inputs are a tensor, a
            tuple (positional) or a dict (keywords). Batches are moved to the model's device. Sample weights [N] enter
            outside the square, ``F = sum_n w_n g_n^2 / sum_n w_n``.
        loss_fn: ``loss_fn(outputs, targets)`` returns one loss per sample, [N]; see :mod:`wplfast.losses`. For "mc" and
            "exact" it must be the negative log-likelihood of ``likelihood``.
        params: what to estimate for: a module, a mapping or (name, tensor) pairs; the names become the keys. Default: all
            of the model's parameters that require grad. The cost falls with the subset.
        unpack: turns what ``data`` yields into such a tuple.
        fisher_type: ``"empirical"`` (given targets), ``"mc"`` (targets drawn from the model) or ``"exact"`` (expectation
            over all classes of outputs [N, C]: one forward pass, C backward passes).
        likelihood: what "mc" draws from: categorical, bernoulli, gaussian (unit variance) or a sampler
            ``(outputs, generator) -> targets``.
        mc_samples: draws per sample.
        max_samples: stop after so many samples.
        generator: for the draws; default: a fresh one with a fixed seed.
        train: leave the modules' modes as they are (dropout on) instead of eval mode.
        with_grad: also compute ``Fisher.mean_grad``, the mean gradient.
        verify: check the first batch against ordinary autograd.
        on_nonfinite: ``"raise"``, or ``"skip"`` to leave out batches with NaN or inf.
        progress: show a progress bar with samples per second.

    Returns:
        A mapping from names to float32 (float64 for float64 parameters) tensors of the parameters' shapes.

    Raises:
        ValueError: if data is empty, losses are not [N], or an option does not fit.
        CoupledSamplesError: if a sample's loss depends on other samples.
        NonFiniteError: if a loss or gradient is NaN or infinite.
        VerificationError: if captured gradients disagree with autograd.

    Example:
        >>> import torch, wplfast
        >>> model = torch.nn.Linear(4, 3)
        >>> data = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
        >>> wplfast.fisher_diagonal(model, data, wplfast.losses.cross_entropy)
        Fisher(2 parameters, 15 elements, 8 samples)

    Source: arXiv:1612.00796, arXiv:1902.08232; the three types as in arXiv:2502.11756.
    """
    _check_options(fisher_type, mc_samples, max_samples)
    accumulator = FisherAccumulator(model, params, with_grad=with_grad, verify=verify, on_nonfinite=on_nonfinite)
    device = device_of(itertools.chain(model.parameters(), accumulator._named.values()))
    if generator is None:
        generator = torch.Generator(device).manual_seed(0)
    started = time.time()
    source = f"wplfast {__version__}, {type(model).__name__}, {fisher_type}"
    with _undisturbed(model, loss_fn, train, device), accumulator, _bar(data, progress) as bar:
        for item in data:
            batch = Batch.of(item, unpack, device)
            room = None if max_samples is None else max_samples - accumulator.n_samples
            before = accumulator.n_samples
            _one_batch(accumulator, model, batch, loss_fn, fisher_type, likelihood, mc_samples, generator, room)
            bar.update(1)
            done = accumulator.n_samples
            bar.set_postfix_str(f"{done / max(time.time() - started, 1e-9):,.0f} samples/s", refresh=False)
            if max_samples is not None and done >= max_samples:
                break
            del before
        if not accumulator.n_samples:
            skipped = accumulator._skipped
            raise ValueError(f"data yielded no usable samples ({skipped} skipped)" if skipped else "data is empty")
        fisher = accumulator._result(final=True)
    fisher.metadata |= {"source": source, "fisher_type": fisher_type, "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    return fisher


def _one_batch(
    accumulator: FisherAccumulator,
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    fisher_type: str,
    likelihood: Likelihood,
    mc_samples: int,
    generator: torch.Generator,
    room: int | None,
) -> None:
    """Run one batch; once more if its first pass only told how to capture it."""
    draws = generator.get_state()
    with torch.random.fork_rng(devices=_cuda_devices(generator.device)):
        state = torch.get_rng_state()
        for _ in range(4):
            torch.set_rng_state(state)
            generator.set_state(draws)
            outputs = batch.forward(model)
            if fisher_type == "exact":
                done = _expectation(accumulator, outputs, batch, loss_fn, room)
            else:
                done = _targets(accumulator, outputs, batch, loss_fn, fisher_type, likelihood, mc_samples, generator, room)
            if done:
                break
        after = torch.get_rng_state()
    torch.set_rng_state(after)


def _targets(
    accumulator: FisherAccumulator,
    outputs: Any,
    batch: Batch,
    loss_fn: LossFn,
    fisher_type: str,
    likelihood: Likelihood,
    mc_samples: int,
    generator: torch.Generator,
    room: int | None,
) -> bool:
    """Accumulate the losses of given or drawn targets."""
    repeats = mc_samples if fisher_type == "mc" else 1
    for repeat in range(repeats):
        targets = draw(outputs, batch.targets, likelihood, generator) if fisher_type == "mc" else batch.targets
        losses = loss_fn(outputs, targets)
        batch.check_losses(losses)
        weights, count = _limit(batch.weights, losses, room)
        if repeats > 1:
            weights = torch.full_like(losses.detach(), 1 / repeats, dtype=torch.float64) if weights is None else weights / repeats
        done = accumulator._accumulate(
            losses, weights, retain_graph=repeat + 1 < repeats, may_replay=repeat == 0, count=0 if repeat else count
        )
        if not done:
            return False
    return True


def _expectation(
    accumulator: FisherAccumulator, outputs: Any, batch: Batch, loss_fn: LossFn, room: int | None
) -> bool:
    """Accumulate all classes, each weighted with its probability."""
    logits = logits_of(outputs)
    if logits.dim() != 2:
        raise ValueError(f"fisher_type='exact' needs outputs [N, C], got {list(logits.shape)}; use fisher_type='mc'")
    probabilities = logits.detach().double().softmax(1)
    n_classes = logits.shape[1]
    for c in range(n_classes):
        losses = loss_fn(outputs, torch.full((len(logits),), c, device=logits.device))
        batch.check_losses(losses)
        weights, count = _limit(batch.weights, losses, room)
        weights = probabilities[:, c] if weights is None else weights * probabilities[:, c]
        done = accumulator._accumulate(
            losses, weights, retain_graph=c + 1 < n_classes, may_replay=c == 0, count=0 if c else count
        )
        if not done:
            return False
    return True


def _limit(weights: Tensor | None, losses: Tensor, room: int | None) -> tuple[Tensor | None, int]:
    """Give samples beyond max_samples the weight zero; return the weights and how many samples count."""
    if weights is not None:
        weights = weights.to(losses.device, torch.float64)
    if losses.dim() != 1 or room is None or room >= len(losses):
        return weights, len(losses) if losses.dim() else 0
    weights = torch.ones(len(losses), dtype=torch.float64, device=losses.device) if weights is None else weights.clone()
    weights[room:] = 0
    return weights, room


def _check_options(fisher_type: str, mc_samples: int, max_samples: int | None) -> None:
    """Check the options that need no data."""
    if fisher_type not in ("empirical", "mc", "exact"):
        raise ValueError(f"fisher_type must be 'empirical', 'mc' or 'exact', got {fisher_type!r}")
    if mc_samples < 1:
        raise ValueError(f"mc_samples must be at least 1, got {mc_samples}")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples must be at least 1, got {max_samples}")


def _bar(data: Iterable[Any], progress: bool) -> Any:
    """Make the progress bar."""
    total = len(data) if hasattr(data, "__len__") else None
    return tqdm(total=total, unit="batch", desc="Fisher", disable=not progress, leave=False)


def _cuda_devices(device: torch.device) -> list[torch.device]:
    """List the devices whose RNG the pass may use."""
    return [device] if device.type == "cuda" else []


@contextmanager
def _undisturbed(model: nn.Module, loss_fn: Any, train: bool, device: torch.device) -> Iterator[None]:
    """Run in eval mode (unless train), with gradients on; restore modes, RNG and the loss's own parameters."""
    modes = [(module, module.training) for module in model.modules()]
    own = [p for p in loss_fn.parameters() if p.requires_grad] if isinstance(loss_fn, nn.Module) else []
    own = [p for p in own if all(p is not q for q in model.parameters())]
    with torch.random.fork_rng(devices=_cuda_devices(device)), torch.enable_grad():
        try:
            if not train:
                model.eval()
            for parameter in own:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter in own:
                parameter.requires_grad_(True)
