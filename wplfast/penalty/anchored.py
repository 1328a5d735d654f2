"""Anchored parameters: all of a penalty but its value: consolidation, running Fishers, rebinding, files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .. import storage
from ..errors import NameMismatchError, StaleParameterError
from ..params import Params
from .anchors import Anchors
from .consolidate import AnchorRule, Normalization, Options, consolidate_
from .references import References
from .state import Faults, faults, from_state, has_anchors, to_state

if TYPE_CHECKING:
    from typing_extensions import Self

#: F in bfloat16 stops moving where rate times its distance from the target is below 2^-8 of it: here, at 6%.
_LEAST_BFLOAT16_RATE = 2**-4


class AnchoredParameters(nn.Module):
    """Parameters that belong to someone else, where they were anchored, and how much each one matters.

    Args:
        params: a module (those of its parameters that require grad), a mapping or (name, tensor) pairs.
        fisher_dtype: float32 (the default) or bfloat16.

    Raises:
        TypeError: if params is of no known form.
        ValueError: if params is empty, or fisher_dtype is another one.
    """

    def __init__(self, params: Params, fisher_dtype: torch.dtype | None = None) -> None:
        """See the class."""
        super().__init__()
        if fisher_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"fisher_dtype must be torch.float32 or torch.bfloat16, got {fisher_dtype}")
        self._references = References(params)
        self._fisher_dtype = fisher_dtype if fisher_dtype == torch.bfloat16 else None
        self._anchors: Anchors | None = None
        self._n_anchors = 0

    def consolidate(
        self,
        fisher: Mapping[str, Tensor],
        *,
        theta_hat: Mapping[str, Tensor] | None = None,
        weight: float = 1.0,
        decay: float = 1.0,
        anchor: AnchorRule = "merge",
        active: Sequence[str] | None = None,
        prefix: str = "",
        normalize: Normalization | None = None,
        clip_norm: float | None = None,
    ) -> None:
        """Anchor the parameters where they are now, with a Fisher that says how much each one matters.

        Args:
            fisher: diagonals by name (:func:`wplfast.fisher_diagonal` or any mapping). A Fisher of this process is
                matched by the identity of the parameters first, then by name.
            theta_hat: anchors by name; default: the current values.
            weight: factor on this Fisher.
            decay: factor on what was there before.
            anchor: ``"merge"``: the penalty becomes the exact sum of decay times the old one and the new one, at the
                cost of one. ``"replace"``: one anchor, the newest, with the decayed sum of Fishers: online EWC
                (Schwarz et al., Progress & Compress, arXiv:1805.06370, with decay for its gamma).
            active: names to consolidate; all others keep what they have, and cost nothing.
            prefix: put before every name when it is looked up.
            normalize: ``"trace"`` divides this Fisher by the mean of its entries (its trace over their number), so that
                alpha is the mean curvature; ``"max"`` by the largest, as importances scaled to [0, 1] (Chaudhry et al.,
                arXiv:1801.10112). Both over all names that are consolidated; tasks whose losses have different scales
                then count alike (arXiv:1805.06370). Default: as it is.
            clip_norm: the most that the Euclidean norm of a parameter's F may be afterwards; larger ones are scaled
                down, each parameter for itself, as the code of arXiv:1902.08232 does.

        Raises:
            NameMismatchError: if a name is missing.
            ValueError: if a shape does not fit, a Fisher is negative or more than its dtype holds, or an option is out
                of range.
            NonFiniteError: if a Fisher or an anchor has NaN or inf.
        """
        options = Options(weight, decay, anchor, normalize, clip_norm)
        names = self._references.chosen(active)
        if not names:
            raise ValueError("active must name at least one parameter, got none")
        with torch.inference_mode(False), torch.no_grad():
            first = self._n_anchors == 0
            tensors = self._references.tensors()
            anchors = Anchors(tensors, self._fisher_dtype) if first else self._current_anchors()
            indices = [self._references.index[name] for name in names]
            theta = [tensors[i] for i in indices]
            outdated = consolidate_(anchors, indices, names, theta, fisher, theta_hat, prefix, options, first)
        self._anchors, self._n_anchors = anchors, 1 if anchor == "replace" else self._n_anchors + 1
        if outdated or first:
            self._anchors_changed()

    def update(
        self,
        fisher: Mapping[str, Tensor],
        rate: float = 0.9,
        *,
        theta_hat: Mapping[str, Tensor] | None = None,
        active: Sequence[str] | None = None,
        prefix: str = "",
        normalize: Normalization | None = None,
        clip_norm: float | None = None,
    ) -> None:
        """Let a running Fisher take in a new one: ``F <- (1 - rate) F + rate F_new``, anchored at the current values.

        This is the rule for architecture search, where one sub-network after the other trains the shared parameters:
        each update names its sub-network as ``active``, and all other parameters keep F and anchor. It is
        :meth:`consolidate` with ``anchor="replace", weight=rate, decay=1 - rate``, whose other arguments it shares.

        Args:
            fisher: of the newest model.
            rate: how much of it enters, in (0, 1].
            theta_hat: anchors by name; default: the current values.
            active: names to update.
            prefix: put before every name when it is looked up.
            normalize: scale the new Fisher first.
            clip_norm: the most that the norm of a parameter's F may be afterwards.

        Raises:
            NameMismatchError: if a name is missing.
            ValueError: as :meth:`consolidate`; and if the rate is not in (0, 1], or so small that F in bfloat16 would
                not move.
            NonFiniteError: if a Fisher or an anchor has NaN or inf.

        Source: arXiv:1902.08232, whose code has lambda_fisher for the rate (0.9) and fisher_clip_by_norm for clip_norm.
        """
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        if self._fisher_dtype == torch.bfloat16 and rate < _LEAST_BFLOAT16_RATE:
            raise ValueError(f"F in bfloat16 would not move far at a rate below {_LEAST_BFLOAT16_RATE}, got {rate}")
        self.consolidate(
            fisher,
            theta_hat=theta_hat,
            weight=rate,
            decay=1 - rate,
            anchor="replace",
            active=active,
            prefix=prefix,
            normalize=normalize,
            clip_norm=clip_norm,
        )

    def reset(self) -> None:
        """Forget all anchors; alpha and l2 stay."""
        self._anchors, self._n_anchors = self._blank_anchors(), 0
        self._anchors_changed()

    def rebind(self, params: Params, *, missing: Literal["error", "drop"] = "error") -> None:
        """Refer to other tensors by the same names: after loading or unpickling, or when the model grew.

        A parameter may have become larger in any dimension, as a classifier's head does with new classes: its old
        entries keep their anchor, new ones are free (F = 0).

        Args:
            params: tensors by name; names that this penalty does not know are ignored.
            missing: what to do about names that params lacks: raise an error, or drop them from the penalty.

        Raises:
            NameMismatchError: if a name is missing, or none is left.
            ValueError: if a parameter became smaller or has another number of dimensions.
        """
        if missing not in ("error", "drop"):
            raise ValueError(f"missing must be 'error' or 'drop', got {missing!r}")
        names = self._references.names
        if missing == "drop":
            given = References(params)
            names = [name for name in names if name in given] or names
        references = References(params, names)
        sources = [self._references.index[name] for name in names]
        anchors = self._anchors
        if anchors is not None:
            theta = references.tensors()
            for name, parameter, source in zip(names, theta, sources, strict=True):
                old, new = list(anchors.fisher[source].shape), list(parameter.shape)
                if len(new) != len(old) or any(a < b for a, b in zip(new, old, strict=True)):
                    raise ValueError(f"params[{name!r}] must have at least its anchor's shape {old}, got {new}")
            with torch.inference_mode(False), torch.no_grad():
                anchors = anchors.moved(theta, sources)
        self._anchors, self._references = anchors, references
        self._kept(sources)
        self._anchors_changed()

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The accumulated Fisher by name (views; do not write to them); empty before the first consolidate."""
        return self._by_name(lambda anchors: anchors.fisher)

    @property
    def theta_hat(self) -> dict[str, Tensor]:
        """The newest anchor by name (views; do not write to them); empty before the first consolidate."""
        return self._by_name(lambda anchors: anchors.theta_hat)

    @property
    def n_anchors(self) -> int:
        """Number of anchors that the penalty is the sum of."""
        return self._n_anchors

    # ---- state -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the anchors to a safetensors file, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        storage.save(path, self._state(), "penalty", {"n_anchors": str(self._n_anchors)})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read anchors that :meth:`save` wrote, strictly by name and shape; on an error nothing changes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, foreign or of another version, or a shape differs.
            NameMismatchError: if names differ.
        """
        state, _ = storage.load(path, "penalty")
        found = self._restore(state)
        if found.missing or found.unexpected:
            raise NameMismatchError(
                f"{os.fspath(path)}: missing {found.missing[:6]}, unexpected {found.unexpected[:6]}"
            )
        if found.errors:
            raise ValueError("; ".join(found.errors))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the anchors to a state_dict (alpha is a setting, not state)."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self._state().items():
            destination[prefix + key] = tensor.clone()  # later consolidations write in place

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the anchors from a state_dict, all or nothing."""
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        found = self._restore(own, strict)
        missing_keys += [prefix + key for key in found.missing]
        error_msgs += found.errors
        if strict:
            unexpected_keys += [prefix + key for key in found.unexpected]

    def _state(self) -> dict[str, Tensor]:
        """Return the anchors as named tensors."""
        return to_state(self._references.names, self._anchors, self._n_anchors)

    def _restore(self, state: Mapping[str, Tensor], strict: bool = True) -> Faults:
        """Take anchors over unless something is wrong with them; other keys are wrong if strict."""
        parameters = dict(zip(self._references.names, self._references.tensors(), strict=True))
        found = faults(state, {name: p.shape for name, p in parameters.items()})
        if not (found.missing or found.errors or (strict and found.unexpected)):
            anchors = self._blank_anchors()
            if has_anchors(state):
                with torch.inference_mode(False), torch.no_grad():
                    anchors = from_state(state, parameters, self._fisher_dtype)
            self._anchors, self._n_anchors = anchors, int(state["n_anchors"])
            self._anchors_changed()
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Ignore ``.to`` and the like: the anchors follow the parameters, and F keeps its dtype."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy the anchors; refer to copied parameters where the same deepcopy copied them, else to the same ones."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        module = deepcopy({key: self.__dict__[key] for key in nn.Module().__dict__ if key in self.__dict__}, memo)
        copy.__dict__.update({**self.__dict__, **module, "_references": self._references.copied(memo)})
        if self._anchors is not None:
            with torch.inference_mode(False), torch.no_grad():
                copy._anchors = self._anchors.moved(self._anchors.theta_hat)
        return copy

    # ---- for the class that evaluates --------------------------------------------------------------------------------

    def _anchors_changed(self) -> None:
        """Take note that anchors or parameters are no longer the same tensors."""

    def _blank_anchors(self) -> Anchors | None:
        """Return what is evaluated when nothing is anchored, or None."""
        return None

    def _by_name(self, column: Callable[[Anchors], list[Tensor]]) -> dict[str, Tensor]:
        """Return some of the anchors' tensors by name; nothing before the first consolidation."""
        if self._anchors is None or self._n_anchors == 0:
            return {}
        return dict(zip(self._references.names, column(self._anchors), strict=True))

    def _kept(self, sources: Sequence[int]) -> None:
        """Take note that the parameters are now those at these positions of the former ones."""

    def _current_anchors(self) -> Anchors:
        """Return the anchors, brought to where the parameters are now.

        Raises:
            StaleParameterError: if a parameter changed its shape.
        """
        theta = self._references.tensors()
        assert self._anchors is not None
        if not self._anchors.fits(theta):
            for name, parameter, fisher in zip(self._references.names, theta, self._anchors.fisher, strict=True):
                if parameter.shape != fisher.shape:
                    expected, got = list(fisher.shape), list(parameter.shape)
                    raise StaleParameterError(
                        f"{name!r} had shape {expected} when it was anchored and now has {got}; use rebind or reset"
                    )
            self._anchors = self._anchors.moved(theta)
            self._anchors_changed()
        return self._anchors
