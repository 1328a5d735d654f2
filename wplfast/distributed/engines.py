"""What wraps a model: the engines that are served, and what to do about the others.

DistributedDataParallel, and DeepSpeed up to ZeRO-2, keep whole parameters on every rank: what they wrap is run in their
place, so that nothing of theirs takes part in a pass. FSDP2's parameters are shards, which are known as such.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UnsupportedParameterError
from .agreement import Group

#: What works in place of an engine that does not.
WORKS = (
    "FSDP2 (torch.distributed.fsdp.fully_shard) is served, with shards of F beside shards of the parameters, and "
    "so are DistributedDataParallel and ZeRO-1/2, where every rank has whole parameters"
)


def inner_module(module: Any) -> Any:
    """Return the module that an engine wraps, whose names have no ``module.`` in front; others as they are."""
    while True:
        if isinstance(module, DistributedDataParallel) or _is_zero_engine(module):
            module = module.module
        elif _is_compiled(module) and inner_module(module._orig_mod) is not module._orig_mod:
            module = module._orig_mod
        else:
            return module


def replicas_in(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DistributedDataParallel modules in a model, from the outermost one on."""
    return [module for module in model.modules() if isinstance(module, DistributedDataParallel)]


def is_replica(model: Any) -> bool:
    """Tell whether an engine keeps the same parameters on all ranks, for the whole of a model or a part of it."""
    return isinstance(model, nn.Module) and (inner_module(model) is not model or bool(replicas_in(model)))


def group_of(model: nn.Module) -> Group:
    """Return the process group whose ranks hold replicas of a model; None: all ranks."""
    return next((ddp.process_group for ddp in replicas_in(model)), None)


def check_engine(model: Any, what: str = "model") -> None:
    """Refuse a model of an engine whose parameters are not whole on this rank, before anything of it is changed.

    Args:
        model: anything that a caller passes for a model or its parameters.
        what: the argument's name.

    Raises:
        UnsupportedParameterError: if it is of FSDP1, DeepSpeed ZeRO-3, tensor parallel or a pipeline.
    """
    if type(model).__module__.startswith("torch.distributed.pipelining"):
        raise UnsupportedParameterError(
            f"{what} is a {type(model).__name__} of torch.distributed.pipelining: a pipeline cuts batches and runs "
            "them by a schedule of its own, in which no sample can be told from another. Estimate the Fisher of the "
            f"whole model without a schedule; {WORKS}"
        )
    if not isinstance(model, nn.Module):
        return
    modules = list(model.modules())
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in modules):
        raise UnsupportedParameterError(
            f"{what} is wrapped in FSDP1 (FullyShardedDataParallel), whose flat parameters have no samples of their "
            f"own: use fully_shard(model) in its place. {WORKS}"
        )
    if fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules):
        return
    tensors: Any = sys.modules.get("torch.distributed.tensor")
    for name, parameter in model.named_parameters():
        check_parameter(name, parameter, what)
        if tensors is not None and isinstance(parameter, tensors.DTensor):
            placed = ", ".join(map(str, parameter.placements))
            raise UnsupportedParameterError(
                f"{what}[{name!r}] is a DTensor ({placed}) of tensor parallelism, whose ranks share the samples and "
                f"not only the parameters. {WORKS}"
            )


def check_parameter(name: str, parameter: Tensor, what: str) -> None:
    """Refuse a parameter that is whole for moments only.

    Raises:
        UnsupportedParameterError: if it is DeepSpeed's, of ZeRO-3.
    """
    if hasattr(parameter, "ds_id") and hasattr(parameter, "ds_status"):
        raise UnsupportedParameterError(
            f"{what}[{name!r}] is partitioned by DeepSpeed ZeRO-3, which has it whole for moments only. {WORKS}"
        )


def _is_zero_engine(module: Any) -> bool:
    """Tell whether a module is DeepSpeed's engine, with parameters that are whole."""
    stage = getattr(module, "zero_optimization_stage", None)
    return isinstance(module, nn.Module) and callable(stage) and hasattr(module, "module") and stage() < 3


def _is_compiled(module: Any) -> bool:
    """Tell whether ``torch.compile`` made a module of another one."""
    return "torch._dynamo" in sys.modules and isinstance(module, torch._dynamo.eval_frame.OptimizedModule)
