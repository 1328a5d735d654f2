"""An optimizer that adds the penalty's gradient itself, before each step."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..params import some

if TYPE_CHECKING:
    from .loss import WeightPlasticityLoss
    from .param_groups import ActiveSet
    from .references import References

logger = logging.getLogger(__name__)

#: Active sets of which it is kept whether an optimizer holds some.
_MAX_KNOWN = 32


def attach(
    penalty: WeightPlasticityLoss, optimizer: torch.optim.Optimizer, attachment: Attachment | None = None
) -> RemovableHandle:
    """Register an :class:`Attachment`; see :meth:`wplfast.WeightPlasticityLoss.attach`."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if hooks is None or not getattr(type(optimizer).step, "hooked", False):
        raise TypeError(f"{type(optimizer).__name__} calls no hooks before step(): attach to the optimizer it wraps")
    if any(isinstance(hook, Attachment) and hook.penalty is penalty for hook in hooks.values()):
        raise ValueError("this penalty is attached to this optimizer already: its gradient would be added twice")
    if attachment is None:
        attachment = Attachment(penalty)
        attachment.held(optimizer)
    handle = optimizer.register_step_pre_hook(attachment)
    if penalty._attached is None:
        penalty._attached = Attached()
    penalty._attached.add(optimizer, handle)
    return handle


class Attached:
    """The optimizers that add a penalty's gradient: is what somebody else adds of it added twice?

    Copies, also pickled ones, know of none, as an optimizer's hooks are the original's.
    """

    def __init__(self) -> None:
        """Know of none."""
        self.is_adding = False  # an optimizer is, just now
        self._handles: list[tuple[weakref.ref[torch.optim.Optimizer], RemovableHandle]] = []
        self._of: References | None = None  # what is known of active sets
        self._known: dict[ActiveSet, bool] = {}

    def __reduce__(self) -> tuple[type[Attached], tuple[()]]:
        """Copy nothing."""
        return Attached, ()

    def add(self, optimizer: torch.optim.Optimizer, handle: RemovableHandle) -> None:
        """Know of one more."""
        self._handles, self._of = [(weakref.ref(optimizer), handle), *self._alive()], None

    def holds_any(self, references: References, key: ActiveSet) -> bool:
        """Tell whether an optimizer adds the gradient of an active set, or of a part of it."""
        alive = self._alive()
        if self._of is not references or len(alive) < len(self._handles) or len(self._known) > _MAX_KNOWN:
            self._handles, self._of, self._known = alive, references, {}
        if key not in self._known:
            held = {id(p) for ref, _ in alive if (o := ref()) for group in o.param_groups for p in group["params"]}
            tensors, names = references.by_name(), references.names if key is None else key
            self._known[key] = any(id(tensors[name]) in held for name in names)
        return self._known[key]

    def _alive(self) -> list[tuple[weakref.ref[torch.optim.Optimizer], RemovableHandle]]:
        """Return those that were not removed."""
        return [pair for pair in self._handles if pair[1].id in (pair[1].hooks_dict_ref() or ())]


class Attachment:
    """The hook: it adds the gradient of a penalty to the parameters that an optimizer holds."""

    def __init__(self, penalty: WeightPlasticityLoss) -> None:
        """Refer to a penalty."""
        self.penalty = penalty
        self._of: tuple[References, list[int]] | None = None  # what the names were found for
        self._names: tuple[str, ...] | None = None

    def __call__(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Add the gradient now, or whenever the closure that ``step`` was given has computed gradients."""
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._add_grad_(optimizer)
            return None

        def with_penalty() -> Any:
            loss = closure()
            value = self._add_grad_(optimizer)
            return None if loss is None else loss + value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": with_penalty}
        return (args[0], with_penalty, *args[2:]), kwargs

    def _add_grad_(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Add the gradient; times the loss scale where the optimizer is to divide by it."""
        scale = getattr(optimizer, "grad_scale", None)  # set by a GradScaler around a fused step
        attached, active = self.penalty._attached or Attached(), self.held(optimizer)
        attached.is_adding = True
        try:
            return self.penalty.add_grad_(1.0 if scale is None else scale, active=active)
        finally:
            attached.is_adding = False

    def held(self, optimizer: torch.optim.Optimizer) -> tuple[str, ...] | None:
        """Return the names of those of the penalty's parameters that an optimizer holds, frozen or not; None for all.

        What another optimizer holds is its affair, also if it is frozen now: it may be thawed later.

        Raises:
            ValueError: if there are none.
        """
        references, held = self.penalty._groups.references, [id(p) for g in optimizer.param_groups for p in g["params"]]
        if self._of is not None and self._of[0] is references and self._of[1] == held:
            return self._names
        ids = set(held)
        pairs = list(zip(references.names, references.tensors(), strict=True))
        names = [name for name, p in pairs if id(p) in ids]
        left = [name for name, p in pairs if id(p) not in ids and p.requires_grad]
        self.judge(names, left, len(pairs))
        self._of, self._names = (references, held), None if len(names) == len(pairs) else tuple(names)
        return self._names

    def judge(self, names: list[str], left: list[str], n_parameters: int) -> None:
        """Refuse an optimizer that holds no parameters of the penalty, and name those that one does not hold.

        Raises:
            ValueError: if it holds none.
        """
        if not names:
            raise ValueError(
                f"the optimizer holds none of the penalty's {n_parameters} parameters "
                f"{some(self.penalty._groups.references.names)}: was it made for another model, or before the "
                "parameters were replaced?"
            )
        if left:
            logger.warning(
                "the optimizer holds %d of the penalty's %d parameters; the gradient of %s is not added for it",
                len(names),
                n_parameters,
                some(left),
            )
