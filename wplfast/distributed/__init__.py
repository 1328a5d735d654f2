"""Several processes, on ``torch.distributed`` as it is.

What the ranks of a process group have of their own enters (data, Fishers, shards, and what went wrong); what is the
same on all of them leaves: one Fisher, or one error that names the rank. It may import what ``fisher`` may, and that
package's ``result`` and ``faults``; ``fisher`` and ``penalty`` import it.
"""

from .replicas import local

__all__ = ["local"]
