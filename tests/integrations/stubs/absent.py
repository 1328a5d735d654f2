"""Stand-ins for packages that Avalanche imports and no test uses, where they are not installed.

Avalanche imports torchvision for its data sets and transforms, which is built for one version of torch each, and
services that nothing here talks to. A stand-in's attributes are empty classes; a package that can be imported is left
alone.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGES = ("torchvision", "pytorchcv", "gdown", "wandb", "GPUtil", "qpsolvers", "tensorboard")


class StandIn(ModuleType):
    """A module that has every attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {"__init__": lambda self, *args, **kwargs: None}))
        return getattr(self, name)


class Finder:
    """Finds stand-ins for the packages that are absent."""

    def __init__(self) -> None:
        self._absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if "tensorboard" in self._absent:
            self._absent.append("torch.utils.tensorboard")

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if self.is_absent(name) else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""

    def is_absent(self, name: str) -> bool:
        return any(name == absent or name.startswith(f"{absent}.") for absent in self._absent)


@contextmanager
def stood_in() -> Iterator[None]:
    """Let imports find stand-ins; afterwards other packages see again that they are absent."""
    finder: Any = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if finder.is_absent(name)]:
            del sys.modules[name]
