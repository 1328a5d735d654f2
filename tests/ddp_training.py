"""Training with a penalty on several ranks; :mod:`test_ddp` compares it with one process."""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from ddp_cases import batch, data, ddp, model
from fisher_cases import ce
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils.data import DataLoader, TensorDataset

import wplfast
from wplfast.distributed.agreement import gathered

ALPHA, RATE, STEPS = 50.0, 0.1, 3

#: 16 samples, which two ranks take in batches of 2, two of which make a step.
SIXTEEN = TensorDataset(*batch(16, 9))


def anchored(wrapper, rank):
    """A penalty over the wrapper, and parameters some way off its anchors, the same on all ranks."""
    wpl = wplfast.WeightPlasticityLoss(wrapper, alpha=ALPHA)
    wpl.consolidate(wplfast.fisher_diagonal(wrapper, data(rank), ce))
    with torch.no_grad():
        for p in wrapper.parameters():
            p += 0.1
    return wpl


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def trained(rank, optimizer, how, wrapper=None):
    """A few steps; "loss": the penalty is part of the loss; "gradient": it is added; "attached": by the optimizer."""
    wrapper = ddp() if wrapper is None else wrapper
    wpl, optimizer = anchored(wrapper, rank), optimizer(wrapper.parameters())
    if how == "attached":
        wpl.attach(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(4, 100 * step + rank)
        loss = ce(wrapper(x), y).mean()
        (loss + wpl() if how == "loss" else loss).backward()
        if how == "gradient":
            wpl.add_grad_()
        optimizer.step()
    return values(wrapper.module), list(wpl.fisher), wpl().item()


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=RATE)


def zero(parameters):
    """ZeRO-1: each rank keeps the state of a part of the parameters, and steps that part."""
    return ZeroRedundancyOptimizer(parameters, torch.optim.Adam, lr=RATE)


def penalised(rank, n):
    found = {how: trained(rank, sgd, how) for how in ("loss", "gradient", "attached")}
    views = ddp(gradient_as_bucket_view=True, static_graph=True)
    return found | {"views": trained(rank, sgd, "gradient", views)}


def sharded_optimizer(rank, n):
    return {how: (trained(rank, adam, how), trained(rank, zero, how)) for how in ("gradient", "attached")}


def accelerated(rank, n):
    """Gradient accumulation over a prepared model and loader; a checkpoint, a step, and that step again."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = model()
    wrapper, optimizer, loader = accelerator.prepare(plain, sgd(plain.parameters()), DataLoader(SIXTEEN, 2))
    fisher = wplfast.fisher_diagonal(wrapper, loader, ce)
    wpl = wplfast.WeightPlasticityLoss(wrapper, alpha=ALPHA)
    wpl.consolidate(fisher)
    accelerator.register_for_checkpointing(wpl)
    folder = gathered(tempfile.mkdtemp())[0]

    def epoch():
        for x, y in loader:
            with accelerator.accumulate(wrapper):
                accelerator.backward(ce(wrapper(x), y).mean())
                if accelerator.sync_gradients:
                    wpl.add_grad_()
                optimizer.step()
                optimizer.zero_grad()
        return values(accelerator.unwrap_model(wrapper))

    found = {"kind": type(wrapper).__name__, "n": fisher.n_samples, "first": epoch()}
    accelerator.save_state(folder)
    kept = dict(wpl.fisher), dict(wpl.theta_hat)
    found["second"] = epoch()
    wpl.reset()
    accelerator.load_state(folder)
    found["restored"] = all(torch.equal(f, kept[0][name]) for name, f in wpl.fisher.items()) and all(
        torch.equal(hat, kept[1][name]) for name, hat in wpl.theta_hat.items()
    )
    found["again"] = epoch()
    dist.barrier()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return found


SITUATIONS = [penalised, sharded_optimizer, accelerated]
