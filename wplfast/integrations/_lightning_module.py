"""A LightningModule as its Trainer runs it: device, precision, transfer of batches; and where its data are."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.agreement import has_group
from ..fisher.batches import moved
from ..params import device_of

#: The names that Lightning is installed under.
PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def packages() -> list[ModuleType]:
    """Return those packages of Lightning that are in use; if none is imported yet, the first that is installed.

    Raises:
        ModuleNotFoundError: if none is.
    """
    found = [sys.modules[name] for name in PACKAGES if name in sys.modules]
    for name in PACKAGES if not found else ():
        try:
            return [import_module(name)]
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    if not found:
        raise ModuleNotFoundError("PyTorch Lightning is not installed: pip install 'wplfast[lightning]'")
    return found


def classes(name: str) -> tuple[Any, ...]:
    """Return a class of Lightning, once for each package in use."""
    return tuple(getattr(package, name) for package in packages())


def trainer_of(module: nn.Module) -> Any:
    """Return the Trainer that a module is attached to, or None."""
    try:
        return getattr(module, "trainer", None)
    except RuntimeError:  # Lightning's way to say so
        return None


def datamodule_of(source: Any) -> Any:
    """Return the LightningDataModule that something is, or a Trainer's; None without one."""
    if isinstance(source, classes("Trainer")):
        return source.datamodule
    return source if isinstance(source, classes("LightningDataModule")) else None


def data_of(source: Any) -> Iterable[Any]:
    """Return the training batches of a data loader, a LightningDataModule or a Trainer.

    Raises:
        ValueError: if a Trainer has not trained yet.
        TypeError: if there are several loaders.
    """
    data = source
    if isinstance(source, classes("LightningDataModule")):
        trainer = source.trainer
        data = None if trainer is None or trainer.datamodule is not source else trainer.train_dataloader
        if data is None:
            data = _loader(source)
    elif isinstance(source, classes("Trainer")):
        data = source.train_dataloader
        if data is None:
            raise ValueError("this Trainer has no training data yet: call fit() first, or pass a data loader")
    if isinstance(data, (dict, list, tuple)) and any(isinstance(part, torch.utils.data.DataLoader) for part in data):
        raise TypeError("there are several training data loaders: pass one of them, or an iterable of batches")
    return data  # type: ignore[no-any-return]


def _loader(datamodule: Any) -> Any:
    """Prepare a data module that no Trainer prepared, as one does: download in one process, set up in all."""
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        datamodule.prepare_data()
    if has_group():
        dist.barrier()
    datamodule.setup("fit")
    return datamodule.train_dataloader()


class AsTrained(nn.Module):
    """A module whose forward pass runs in the precision that its Trainer trains with.

    Args:
        module: the LightningModule.
        datamodule: whose hooks move batches where it overrides them, or None.
        call: what a forward pass is: the module itself, or one of its methods.
    """

    def __init__(self, module: nn.Module, datamodule: Any, call: Callable[..., Any]) -> None:
        """See the class."""
        super().__init__()
        self.module = module
        trainer = trainer_of(module)
        self._call, self._datamodule = call, datamodule
        self._precision = None if trainer is None else trainer.precision_plugin
        self._device = None if trainer is None else trainer.strategy.root_device
        self.is_distributed = trainer is not None and trainer.world_size > 1 and has_group()

    def precision(self) -> AbstractContextManager[None]:
        """Return the context of a forward pass and its loss."""
        return nullcontext() if self._precision is None else self._precision.forward_context()

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Run it."""
        with self.precision():
            return self._call(*inputs, **named)

    def transferred(self, batch: Any) -> Any:
        """Move a batch as the Trainer does."""
        if self._precision is not None:
            batch = self._precision.convert_input(batch)
        batch = self._hook("on_before_batch_transfer")(batch, 0)
        hook, device = self._hook("transfer_batch_to_device"), device_of(self.parameters())
        batch = moved(batch, device) if _is_lightnings(hook) else hook(batch, device, 0)
        return self._hook("on_after_batch_transfer")(batch, 0)

    def _hook(self, name: str) -> Callable[..., Any]:
        """Return a hook of the data module if it overrides it, else the module's."""
        own = getattr(self._datamodule, name, None)
        return getattr(self.module, name) if own is None or _is_lightnings(own) else own  # type: ignore[no-any-return]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Be on the Trainer's device, where nothing is logged."""
        device = device_of(self.module.parameters())
        with _silent(self.module):
            try:
                if self._device is not None:
                    self.module.to(self._device)
                yield
            finally:
                self.module.to(device)


def _is_lightnings(hook: Any) -> bool:
    """Tell whether a bound method is the one that Lightning defines."""
    return str(hook.__func__.__module__).startswith(("lightning.", "pytorch_lightning."))


@contextmanager
def _silent(module: nn.Module) -> Iterator[None]:
    """Let ``self.log`` do nothing: outside of a Trainer's loop it is an error."""
    logging_modules = [sub for sub in module.modules() if isinstance(sub, classes("LightningModule"))]
    names = ("log", "log_dict")
    kept = [{name: sub.__dict__[name] for name in names if name in sub.__dict__} for sub in logging_modules]
    try:
        for sub in logging_modules:
            sub.__dict__.update(dict.fromkeys(names, _nothing))
        yield
    finally:
        for sub, own in zip(logging_modules, kept, strict=True):
            for name in names:
                sub.__dict__.pop(name, None)
            sub.__dict__.update(own)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
