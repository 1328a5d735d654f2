"""A penalty's anchors in a ``state_dict``, in files, and in copies."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from .. import storage
from ..errors import NameMismatchError, WplfastError
from ..ops.consolidation import Consolidation
from .anchors import Anchors
from .attach import Attached
from .param_groups import ParamGroups
from .references import References
from .said import UNANCHORED, Said
from .state import Faults, faults, from_state, has_anchors, to_state

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)
_LOAD_STATE_DICT = getattr(nn.Module.load_state_dict, "__code__", None)


class Saved(nn.Module):
    """A module whose state is its anchors: what :class:`wplfast.WeightPlasticityLoss` is when nobody evaluates it."""

    _groups: ParamGroups
    _said: Said
    _attached: Attached | None = None  # to optimizers, if it ever was
    _fisher_dtype: torch.dtype | None

    @property
    def n_anchors(self) -> int:
        """Number of anchors that the penalty is the sum of."""
        anchors = self._groups.anchors
        return 0 if anchors is None else anchors.n_anchors

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the anchors to a safetensors file, atomically.

        Raises:
            OSError: if the file cannot be written.
        """
        storage.save(path, self._state(), "penalty", {"n_anchors": str(self.n_anchors)})

    def load(self, path: str | os.PathLike[str], strict: bool = True) -> _IncompatibleKeys:
        """Read anchors that :meth:`save` wrote, by name; on an error nothing changes.

        The penalty then pulls towards the file's anchors, wherever the parameters are.

        Args:
            path: of the file.
            strict: whether all names and shapes must be alike. Otherwise what fits is loaded: parameters that both
                know, and the old entries of those that grew since (new ones are free). Others keep what they have.

        Returns:
            What did not fit: ``missing_keys`` of this penalty, ``unexpected_keys`` of the file.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is truncated, foreign or of another version, or a shape differs.
            NameMismatchError: if names differ; if not strict, if nothing fits.
        """
        with self._groups.references.together("reading a penalty"):
            state, _ = storage.load(path, "penalty")
        found = self._restore(state, strict)
        differing = f"missing {found.missing[:6]}, unexpected {found.unexpected[:6]}"
        if strict and (found.missing or found.unexpected):
            raise NameMismatchError(f"{os.fspath(path)}: {differing}; strict=False loads what fits")
        if found.errors:
            raise ValueError("; ".join(found.errors))
        if has_anchors(state) and not found.fitting:
            raise NameMismatchError(f"{os.fspath(path)}: nothing fits: {differing}")
        return _IncompatibleKeys(found.missing, found.unexpected)

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
        """Take the anchors from a state_dict: all or nothing if strict, else what fits, as :meth:`load` does.

        With ``assign=True`` the model's parameters were replaced just before, and are followed by name. Where they are
        replaced after this (the penalty is registered first), the next use says so.
        """
        if local_metadata.get("assign_to_params_buffers"):
            self._follow()
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        strict = _strict_call(strict)
        found = self._restore(own, strict)
        missing_keys += [prefix + key for key in found.missing]
        unexpected_keys += [prefix + key for key in found.unexpected]
        error_msgs += found.errors
        if not (strict or found.fitting or found.errors or (found.headed and not has_anchors(own))):
            logger.warning("load_state_dict: nothing fits the penalty %r: missing %s", prefix, found.missing[:6])

    def _fqn_modifiers(self) -> dict[str, str]:
        """Refuse what ``torch.distributed.checkpoint.state_dict`` does, which alone asks for this.

        Raises:
            WplfastError: always.
        """
        raise WplfastError(
            "get_model_state_dict takes the keys of a model's state for names of attributes, which those of a penalty "
            "inside of the model are not. Save model.state_dict(), which has them, with dcp.save; "
            "or keep the penalty outside of the model and save {'model': get_model_state_dict(model), 'wpl': "
            "wpl.state_dict()}"
        )

    def _state(self) -> dict[str, Tensor]:
        """Return the anchors as named tensors."""
        groups = self._groups
        state = to_state(groups.references.names, groups.anchors)
        if not groups.references.is_sharded:
            return state
        from ..distributed.shards import as_shards  # not with the package

        return as_shards(state, groups.references.by_name())

    def _restore(self, state: Mapping[str, Tensor], strict: bool) -> Faults:
        """Take anchors over unless something is wrong with them; if not strict, what fits."""
        groups = self._groups
        references = groups.references
        with references.together("loading a penalty"):
            if references.is_sharded:
                from ..distributed.shards import localised

                state = localised(state, references.by_name())
            return self._restore_parts(state, strict, groups, references)

    def _restore_parts(
        self, state: Mapping[str, Tensor], strict: bool, groups: ParamGroups, references: References
    ) -> Faults:
        """Take over anchors of what lies on this rank."""
        parameters = dict(zip(references.names, references.parts(), strict=True))
        found = faults(state, parameters, self._fisher_dtype, strict)
        if references.is_sharded:
            from ..distributed.shards import agreed

            found.join(agreed(found))
        if found.errors or not found.headed or (strict and (found.missing or found.unexpected)):
            return found
        anchors = self._blank(references, groups.l2)
        if has_anchors(state):
            if not found.fitting:
                return found
            with torch.inference_mode(False), torch.no_grad():
                tensors = references.parts()
                if self.n_anchors and len(found.fitting) < len(parameters):  # the others keep what they have
                    anchors = groups.anchors_beside(tensors).moved(tensors)
                else:
                    anchors = Anchors(tensors, self._fisher_dtype)
                anchors = from_state(state, parameters, found.fitting, anchors)
        self._commit(ParamGroups(references, anchors, groups.alpha, groups.l2, groups.active_sets))
        if self.n_anchors:
            self._said.hush(UNANCHORED)
        return found

    def _follow(self) -> None:
        """Refer to the parameters that the module holds now by the same names, where they were replaced."""
        groups = self._groups
        references = groups.references.followed()
        if references is not groups.references:
            self._commit(groups.rebound(references, lambda _: groups.alpha))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Ignore ``.to`` and the like: the anchors follow the parameters, and F keeps its dtype."""
        return self

    def __copy__(self) -> Self:
        """Return a penalty over the same parameters with anchors of its own: two that shared some would spoil them."""
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__ = {
            **self.__dict__,
            "_groups": deepcopy(self._groups),
            "_said": deepcopy(self._said),
            "_attached": None,
        }
        return twin

    def _commit(self, groups: ParamGroups, change: Consolidation | None = None) -> None:
        """Put groups in the place of those that are, and change the buffers that they share, all at once.

        Interrupts are raised between steps of Python code. There are none between the last step of the change and the
        assignment: no function here is written in Python, nor called through one (attributes of a module are, and
        functions of PyTorch under a mode).
        """
        guard = torch._C.DisableTorchFunction()
        leave = partial(type(guard).__exit__, guard, None, None, None)
        steps = [partial(type(guard).__enter__, guard), *(() if change is None else change.steps())]
        steps += [partial(self.__dict__.__setitem__, "_groups", groups), leave]
        try:
            list(map(partial.__call__, steps))
        except BaseException:
            leave()
            raise

    def _blank(self, references: References, l2: float) -> Anchors | None:
        """Return anchors that do not hold, where there is a weight decay term to evaluate."""
        with torch.inference_mode(False), torch.no_grad():
            return Anchors(references.parts(), self._fisher_dtype) if l2 else None


def _strict_call(default: bool) -> bool:
    """Tell whether the ``load_state_dict`` that is going on is strict; PyTorch tells its modules that every one is."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not _LOAD_STATE_DICT:
        frame = frame.f_back
    return default if frame is None else bool(frame.f_locals.get("strict", default))
