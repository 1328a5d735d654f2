"""Who launches Triton kernels, and what a kernel that cannot be compiled or started is to those who launch it.

A launch from a pack takes the CUDA driver and nothing else: neither a compiler nor a C compiler is there at run time,
and Triton's own driver is not loaded. Kernels are loaded from a pack when they are first launched.

Environment:
    WPLFAST_KERNELS: ``jit`` (default): Triton's own launcher does every launch. ``relaunch``: the kernels of a penalty
        whose parameters stay where they are go past its look at every argument from their second launch on. ``auto``:
        packs serve what they hold, too. ``pack``: a launch that no pack serves is an error, not a compilation.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ..exchange import EXCHANGE
from .packs import archives as packs
from .packs.archives import LOADED, Pack, PackError

logger = logging.getLogger(__name__)

#: What a launch may say to the compiler.
OPTION_NAMES = ("enable_fp_fusion", "num_stages", "num_warps")
#: Triton's names of the types that tensors have; the JIT serves others.
TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
#: Who launches, unless WPLFAST_KERNELS says so. All but ``jit`` is for those who ask for it until ``make gpu-test`` has
#: passed on a GPU and its record is in benchmarks/results.
DEFAULT = "jit"
#: What CUDA says of work that was started before this, or of memory: no other kernel would do better.
_NOT_THE_KERNELS = ("out of memory", "illegal memory access", "device-side assert", "launch failure")
#: What compilers and drivers say of a kernel that needs more than there is.
_LARGE = ("out of resource", "too many resources", "too much shared data")
#: How many kernels were launched in this process, without those that are launched again past all of this.
COUNT = [0]
_CONSTANTS = {dtype: dtype.name for dtype in (tl.float32, tl.float64, tl.bfloat16, tl.float16)}


class KernelError(RuntimeError):
    """A kernel could not be compiled or started: nothing was launched.

    Args:
        kernel: its name.
        cause: what was raised.
    """

    def __init__(self, kernel: str, cause: Exception) -> None:
        self.kernel = kernel
        self.reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:300]  # it may go on with the whole program
        super().__init__(f"{kernel} cannot be compiled or started: {self.reason}")


class TooLargeError(KernelError):
    """The same, since it needs more of the device than there is: a smaller tile may do."""


def failure(kernel: str, cause: Exception) -> Exception:
    """Return what to raise where the launch of a kernel has raised something."""
    text = str(cause)
    if isinstance(cause, (KernelError, MemoryError, torch.OutOfMemoryError)) or any(
        w in text for w in _NOT_THE_KERNELS
    ):
        return cause
    large = isinstance(cause, triton.runtime.errors.OutOfResources) or any(words in text for words in _LARGE)
    return (TooLargeError if large else KernelError)(kernel, cause)


class Kernel(triton.JITFunction):  # type: ignore[misc]
    """A Triton function that is launched from a pack where one has it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return what launches a grid of programs, and returns what can be launched again."""
        if SERVER is None:
            return lambda *args, **options: self.jit(grid, args, options)
        return partial(SERVER.launch, self, grid)

    def jit(self, grid: tuple[int, ...], args: Sequence[Any], options: dict[str, Any]) -> Any:
        """Launch by the JIT; raise KernelError where it cannot."""
        try:
            launched = self.run(*args, grid=grid, warmup=False, **options)
        except Exception as error:
            raise failure(self.__name__, error) from error
        COUNT[0] += 1
        return launched


def kernel(
    *, do_not_specialize: Sequence[str] = (), do_not_specialize_on_alignment: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel that is launched, in the place of ``triton.jit``, with the same meaning.

    Args:
        do_not_specialize: arguments that one compiled kernel takes whatever their value.
        do_not_specialize_on_alignment: arguments for which it may be 1 or None that are told apart, but no more.
    """
    specialisation = {
        "do_not_specialize": list(do_not_specialize),
        "do_not_specialize_on_alignment": list(do_not_specialize_on_alignment),
    }

    def decorate(function: Callable[..., Any]) -> Any:
        if triton.knobs.runtime.interpret:
            return triton.jit(function, **specialisation)
        return Kernel(function, **specialisation)

    return decorate


class Tables:
    """Makes the tables in which C++ finds kernels.

    Args:
        exchange: the table of functions that tell tensors' addresses, see ``exchange``.
    """

    def __init__(self, exchange: object | None = EXCHANGE) -> None:
        self.reader = packs.EXTENSION.TensorReader(torch.Tensor, TYPES, exchange)

    def table(self, function: Kernel) -> Any:
        """Return a ``_C.LaunchTable`` for a kernel, empty."""
        flags = [
            p.is_constexpr + 2 * (not p.do_not_specialize) + 4 * (not p.do_not_specialize_on_alignment)
            for p in function.params
        ]
        return packs.EXTENSION.LaunchTable(self.reader, function.arg_names, flags, OPTION_NAMES, _CONSTANTS)


class Server:
    """Serves launches from packs.

    Args:
        required: a launch that no pack serves is an error.
        current_device: returns the number of the device to launch on.
        current_stream: returns the stream to launch in, for the number of a device.
        capability: returns a device's compute capability.
    """

    def __init__(
        self,
        required: bool,
        current_device: Callable[[], int] = torch.cuda.current_device,
        current_stream: Callable[[int], int] | None = None,
        capability: Callable[[int], tuple[int, int]] = torch.cuda.get_device_capability,
    ) -> None:
        self._required = required
        self._current_device, self._capability = current_device, capability
        self._current_stream = current_stream or torch._C._cuda_getCurrentRawStream
        self._tables = Tables()
        self._packs: dict[int, Pack | None] = {}
        #: (kernel, device) -> its table, None where the device's pack does not have the kernel
        self._found: dict[tuple[str, int], Any] = {}

    def launch(self, function: Kernel, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
        """Launch a kernel on the current device; return what can be launched again for arguments of the same kind."""
        device = self._current_device()
        name = function.__name__
        try:
            table = self._found[name, device]
        except KeyError:
            table = self._find(function, device)
        key = None
        if table is not None:
            try:
                launched = table.launch(grid, args, options)
                if isinstance(launched, LOADED):
                    COUNT[0] += 1
                    return launched
                key = launched
                loaded = None if key is None else self._load(name, device, key)
                if loaded is not None:
                    table.add(key, loaded)
                    COUNT[0] += 1
                    return table.launch(grid, args, options)
            except Exception as error:
                if self._required:
                    raise
                raise failure(name, error) from error
        if self._required:
            raise RuntimeError(
                f"WPLFAST_KERNELS=pack: no pack in {packs.folder()} serves {name}({key or 'unknown arguments'}) on "
                f"device {device}, of compute capability {self._capability(device)}"
            )
        return function.jit(grid, args, options)

    def pack(self, device: int) -> Pack | None:
        """Return the pack that serves a device."""
        if device not in self._packs:
            self._packs[device] = packs.find(self._capability(device))
        return self._packs[device]

    def _find(self, function: Kernel, device: int) -> Any:
        """Return the table of a kernel on a device, None where its pack does not have it."""
        pack = self.pack(device)
        known = pack is not None and function.__name__ in pack.kernels
        table = self._tables.table(function) if known else None
        return self._found.setdefault((function.__name__, device), table)

    def _load(self, name: str, device: int, key: str) -> Any:
        """Load a kernel from the pack; return None where it is not there."""
        pack = self.pack(device)
        found = None if pack is None else pack.kernels[name].get(key)
        if pack is None or found is None:
            return None
        try:
            return LOADED(
                self._tables.reader, self._current_stream, device, pack.image(found), found.function, found.warps,
                found.shared, found.parameters,
            )  # fmt: skip
        except (PackError, RuntimeError) as error:  # damaged, or a driver too old for the code
            logger.warning("%s: %s cannot be loaded, Triton compiles it instead: %s", pack.path, name, error)
            pack.kernels[name].pop(key, None)
            return None


def mode() -> str:
    """Return the value of WPLFAST_KERNELS."""
    chosen = os.environ.get("WPLFAST_KERNELS", DEFAULT)
    if chosen not in ("jit", "relaunch", "auto", "pack"):
        raise ImportError(f"WPLFAST_KERNELS must be 'jit', 'relaunch', 'auto' or 'pack', got {chosen!r}")
    return chosen


def _server() -> Server | None:
    """Return what serves launches of this process, None if it is the JIT alone."""
    chosen = mode()
    if chosen in ("jit", "relaunch") or triton.knobs.runtime.interpret:
        return None
    if torch.version.cuda is None:  # no look at the devices: that would keep processes from being forked
        return None
    if packs.EXTENSION is None:
        if chosen == "pack":
            raise ImportError("WPLFAST_KERNELS=pack: packs are launched by the C++ extension wplfast._C")
        return None
    return Server(chosen == "pack") if chosen == "pack" or packs.present() else None


#: Whether kernels of prepared penalties go past the JIT from their second launch on.
RELAUNCHES = mode() != "jit"
#: What launches go through: a :class:`Server`, or what records them; None for the JIT alone.
SERVER: Any = _server()


def serve(server: Any) -> Any:
    """Let launches of this process go through another server; return the one before."""
    global SERVER
    before, SERVER = SERVER, server
    return before
