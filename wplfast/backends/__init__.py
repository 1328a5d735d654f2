"""Backends of the op contract: each registers its functions for one dispatch key, and the dispatcher chooses.

The plain-PyTorch backend stands behind every device, so a backend that is missing (no compiler when the package was
built, no Triton) is simply not registered: nothing else in the package asks which one runs.

Environment:
    WPLFAST_BACKEND: ``auto`` (default) or the one backend to register beside ``reference``: ``reference``, ``cpp`` or
        ``triton``. Under ``TRITON_INTERPRET=1``, ``triton`` serves CPU tensors too (slowly; for tests).
    WPLFAST_REQUIRE: comma-separated backends whose absence is an ImportError instead of a fall-back (for CI).
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from ..ops.consolidation import Consolidation
from ..ops.contract import SCHEMAS, add_kernel
from ..ops.kept import KeptPenalties
from ..ops.prepared import PreparedPenalty

logger = logging.getLogger(__name__)

#: name -> (module, dispatch keys it serves, in order of preference over earlier rows)
_KNOWN: dict[str, tuple[str, tuple[str, ...]]] = {
    "reference": (".reference", ("CompositeExplicitAutograd",)),
    "cpp": (".cpp", ("CPU",)),
    "triton": (".triton", ("CUDA",)),
}
_available: dict[str, ModuleType] = {}
_missing: dict[str, str] = {}
_serving: dict[str, str] = {}


def available() -> dict[str, ModuleType]:
    """Return the backends that can run on this machine, by name."""
    return dict(_available)


def missing() -> dict[str, str]:
    """Return the backends that could not be imported, with the reason."""
    return dict(_missing)


def serving(device_type: str) -> str:
    """Return the name of the backend that serves tensors of a device type such as ``cpu`` or ``cuda``."""
    return _serving.get(device_type.upper(), "reference")


def gave_way() -> dict[str, str]:
    """Return what plain PyTorch does in this process since a kernel could not be compiled or started, and why."""
    found: dict[str, str] = getattr(_available.get("triton"), "gave_way", dict)()
    return found


def prepared_penalty(device_type: str) -> type[PreparedPenalty]:
    """Return the class of prepared penalties on a device type: a backend's own, or the common one."""
    own: type[PreparedPenalty] | None = getattr(_available.get(serving(device_type)), "prepared_penalty", None)
    return own or PreparedPenalty


def kept_penalties(device_type: str) -> KeptPenalties | None:
    """Return what the backend on a device type keeps of penalties over lists of tensors; None for nothing."""
    kept: KeptPenalties | None = getattr(_available.get(serving(device_type)), "kept_penalties", None)
    return kept


def consolidation(device_types: Iterable[str]) -> type[Consolidation]:
    """Return the class of consolidations on some device types: the one backend's own, or the common one."""
    kinds = {getattr(_available.get(serving(kind)), "consolidation", Consolidation) for kind in set(device_types)}
    return kinds.pop() if len(kinds) == 1 else Consolidation


def _load() -> None:
    """Import every backend and register it; called once, by the package."""
    choice = os.environ.get("WPLFAST_BACKEND", "auto")
    if choice != "auto" and choice not in _KNOWN:
        raise ImportError(f"WPLFAST_BACKEND must be 'auto' or one of {sorted(_KNOWN)}, got {choice!r}")
    for name, (module, keys) in _KNOWN.items():
        try:
            _available[name] = importlib.import_module(module, __name__)
        except ImportError as error:
            _missing[name] = str(error)
            continue
        if choice not in ("auto", name) and name != "reference":
            continue
        if name == "triton" and choice == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            keys = ("CUDA", "CPU")
        _register(name, keys)
    if "cpp" in _missing and choice == "auto":
        _warn_in_sources(Path(__file__).parents[2])
    required = {name for name in os.environ.get("WPLFAST_REQUIRE", "").split(",") if name}
    required |= {choice} - {"auto"}
    absent = {name: _missing.get(name, "unknown backend") for name in required - _available.keys()}
    if absent:
        raise ImportError(f"required backends are missing: {absent}")


def _warn_in_sources(root: Path) -> None:
    """Say that kernels are missing where Python took the package from a folder of sources, which hides another one."""
    if (root / "csrc" / "bindings.cpp").is_file():
        logger.warning(
            "wplfast is imported from the sources in %s, where its C++ kernels are not built: plain PyTorch does their "
            "work, several times slower. Start Python in another folder to use an installed wplfast, or build them "
            "there: pip install -e .",
            root,
        )


def _register(name: str, keys: tuple[str, ...]) -> None:
    """Register one backend's functions for its dispatch keys."""
    for key in keys:
        for op in SCHEMAS:
            add_kernel(op, key, getattr(_available[name], op))
        _serving[key] = name


_load()
