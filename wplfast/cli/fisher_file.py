"""Files of Fishers for commands that look at them tensor by tensor, so that they may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..fisher.faults import check_values, pop_counts
from ..fisher.files import KIND, check_held, divided
from ..fisher.origins import passes_of
from ..storage import OpenFile, opened
from ..storage.reading import DTYPES


class FisherFile:
    """An open file of a Fisher.

    Attributes:
        path: of the file.
        file: the file itself, with its metadata.
        names: of the parameters, in the Fisher's order.
        n_samples: samples behind it.
        total_weight: sum of their weights.
        parts: "fisher", "mean_grad" or "theta_hat" -> names that the file holds of it.
    """

    def __init__(self, file: OpenFile) -> None:
        """Read what the header says.

        Raises:
            ValueError: if that is not what a Fisher writes.
        """
        self.path, self.file = file.path, file
        self.names, self.n_samples, self.total_weight = pop_counts(dict(file.metadata), file.path)
        self.parts: dict[str, set[str]] = {}
        for stored in file.entries:
            part, name = divided(stored, file.path)
            self.parts.setdefault(part, set()).add(name)
        check_held(self.names, sorted(self.parts.get("fisher", ())), file.path)

    def shape(self, name: str, part: str = "fisher") -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.file.entries[f"{part}.{name}"].shape

    def dtype(self, name: str, part: str = "fisher") -> torch.dtype:
        """Return the type of a parameter's tensor."""
        return DTYPES[self.file.entries[f"{part}.{name}"].dtype]

    def get(self, name: str, part: str = "fisher") -> Tensor:
        """Return a tensor, which may only be read."""
        return self.file.get(f"{part}.{name}")

    def check(self) -> None:
        """Check what reading a whole file checks, a tensor at a time: the checksum, and every number.

        Raises:
            ValueError: if the file is damaged, or holds what no Fisher is.
        """
        self.file.check()
        for name in self.names:
            check_values({name: self.get(name)}, None, self.path)
        for name in sorted(self.parts.get("mean_grad", ())):
            check_values({}, {name: self.get(name, "mean_grad")}, self.path)

    @property
    def provenance(self) -> list[str]:
        """What tells the samples behind it from others: one entry for each pass that was merged into it."""
        checksum = self.file.stored_checksum
        return passes_of(self.file.metadata) or ([f"checksum {checksum}"] if checksum else [])


@contextmanager
def fisher_file(path: str) -> Iterator[FisherFile]:
    """Open a file of a Fisher.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no file of a Fisher.
    """
    with opened(path, KIND) as file:
        yield FisherFile(file)
