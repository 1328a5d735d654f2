"""Several processes, on ``torch.distributed`` as it is.

What the ranks of a process group have of their own enters (data, Fishers, shards, and what went wrong); what is the
same on all of them leaves: one Fisher, or one error that names the rank. It may import what ``fisher`` may, and that
package's ``result`` and ``faults``; ``fisher`` and ``penalty`` import it.
"""

from typing import TYPE_CHECKING, Any

from .replicas import local

if TYPE_CHECKING:
    from .checkpoints import WholeState, load_penalty

__all__ = ["WholeState", "load_penalty", "local"]


def __getattr__(name: str) -> Any:
    """Import what needs ``torch.distributed.checkpoint`` when it is first asked for."""
    if name not in ("WholeState", "load_penalty"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import checkpoints

    return getattr(checkpoints, name)
