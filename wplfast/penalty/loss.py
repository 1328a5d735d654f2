"""``WeightPlasticityLoss``: the penalty as a module that holds no parameters of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import functional
from ..ops.layout import flat_dtype
from ..params import Params, device_of
from .anchored import AnchoredParameters
from .anchors import Anchors
from .coefficients import Alpha, alpha_tensor
from .param_groups import ParamGroup, ParamGroups

if TYPE_CHECKING:
    from typing_extensions import Self


class WeightPlasticityLoss(AnchoredParameters):
    """``alpha/2 sum_i F_i (theta_i - theta_hat_i)^2 + l2/2 |theta|^2`` over shared parameters.

    The module refers to the parameters without owning them: ``wpl.parameters()`` is empty, and as a submodule it adds
    only its anchors to ``state_dict``. It never copies them either; each call checks that they are where they were, and
    follows them to another device, dtype or address.

    Args:
        params: the shared parameters: a module (those that require grad), a mapping or (name, tensor) pairs.
        alpha: strength of the anchor; a float, a 0-d tensor, or {prefix: float} (the longest matching prefix counts, ""
            matches all). What counts is alpha times F, so search over ``alpha * fisher.flat.mean()``, by decades around
            1. An F made of squared batch gradients is smaller by up to the batch size, and its alpha larger.
        l2: strength of a plain weight decay term over the same parameters.
        fisher_dtype: how F is kept: float32 (the default), or bfloat16, which halves its memory and traffic and rounds
            every entry by up to 2^-8 = 0.4%, once for each :meth:`consolidate`. F of float64 parameters is float64.

    Raises:
        TypeError: if params is of no known form.
        ValueError: if params is empty, alpha or l2 is negative or not finite, a parameter matches no prefix, or
            fisher_dtype is another one.

    Example:
        >>> import torch, wplfast
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> wpl = wplfast.WeightPlasticityLoss({"w": w}, alpha=2.0)
        >>> wpl.consolidate({"w": torch.tensor([1.0, 3.0])})
        >>> with torch.no_grad(): _ = w.add_(1.0)
        >>> wpl().item()
        4.0
        >>> wpl.add_grad_().item(), w.grad
        (4.0, tensor([2., 6.]))

    Source: Benyahia, Yu et al., "Overcoming Multi-Model Forgetting", ICML 2019, arXiv:1902.08232; with all parameters
        of one model it is EWC, arXiv:1612.00796.
    """

    def __init__(
        self, params: Params, alpha: Alpha = 1.0, *, l2: float = 0.0, fisher_dtype: torch.dtype | None = None
    ) -> None:
        """See the class."""
        super().__init__(params, fisher_dtype)
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be finite and not negative, got {l2}")
        self._l2_value = float(l2)
        self._alpha_values: Tensor = alpha_tensor(alpha, self._references.names, device_of(self._references.tensors()))
        self._alpha_version = self._alpha_values._version
        self._groups = ParamGroups()
        self._anchors = self._blank_anchors()
        self._anchors_changed()

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def forward(self, active: Sequence[str] | None = None) -> Tensor:
        """Return the penalty.

        Args:
            active: names to restrict it to; default: all.

        Returns:
            A 0-d tensor, float32 or wider, differentiable with respect to the parameters. Before any
            :meth:`consolidate` it is the l2 term alone.

        Raises:
            NameMismatchError: if an active name is unknown.
            StaleParameterError: if a parameter changed its shape, lost its memory, or was replaced in its module.
        """
        if self._anchors is None or (active is not None and len(active) == 0):
            return self._nothing(active)
        return functional.total([group.value() for group in self._active_groups(active)])

    def add_grad_(self, scale: float | Tensor = 1.0, active: Sequence[str] | None = None) -> Tensor:
        """Add ``scale`` times the penalty's gradient to the parameters' ``.grad`` in one pass, without a graph.

        Use it after ``backward``, all-reduce, unscaling and clipping, once a step; under DDP it is the way. ``.grad``
        is allocated where it is None; parameters that do not require grad are left alone.

        Args:
            scale: factor; a float or a 0-d tensor.
            active: names to restrict it to; default: all.

        Returns:
            The penalty (not scaled), 0-d, without a graph and without a host synchronisation.

        Raises:
            NameMismatchError: if an active name is unknown.
            StaleParameterError: if a parameter changed its shape, lost its memory, or was replaced in its module.
            ValueError: if a ``.grad`` has another dtype or layout than its parameter, or two overlap; nothing is added.
        """
        with torch.no_grad():
            if self._anchors is None or (active is not None and len(active) == 0):
                return self._nothing(active)
            groups = self._active_groups(active)
            if len(groups) > 1:  # or an error in a later one would leave the earlier ones added
                for group in groups:
                    group.check_parameter_grads()
            return functional.total([group.add_grad_(scale) for group in groups])

    def subset(self, names: Sequence[str]) -> Subset:
        """Return a handle to the penalty over some parameters, for hot loops.

        Args:
            names: of the parameters; each once.

        Returns:
            A callable with ``add_grad_``, like the penalty itself; ``fisher_diagonal(..., params=handle)`` takes it.

        Raises:
            NameMismatchError: if a name is unknown.
        """
        handle = Subset(self, tuple(self._references.chosen(names)))
        if self._anchors is not None:
            self._active_groups(handle.names)
        return handle

    @property
    def alpha(self) -> Tensor:
        """Strength of the anchor: 0-d float64, or one entry per parameter if it was given by prefix.

        Setting it, or writing to it, changes the value in place: compiled code and CUDA graphs see it without being
        built anew (writing to entries by prefix, from the next call outside of them on).
        """
        return self._alpha_values

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        values = alpha_tensor(value, self._references.names, device_of(self._references.tensors()))
        same_form = values.shape == self._alpha_values.shape
        if same_form:
            self._alpha_values.copy_(values)
            self._alpha_changed()
        else:
            self._alpha_values, self._alpha_version = values, values._version
            self._anchors_changed()

    def __getstate__(self) -> dict[str, Any]:
        """Pickle names and anchors, not the parameters: a copy elsewhere must be bound to parameters there."""
        return {**self.__dict__, "_groups": ParamGroups()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Copy anchors and alpha."""
        copy = super().__deepcopy__(memo)
        with torch.inference_mode(False):
            copy._alpha_values, copy._groups = self._alpha_values.clone(), ParamGroups()
        copy._alpha_version = copy._alpha_values._version
        return copy

    def extra_repr(self) -> str:
        """Summarise."""
        numel = sum(p.numel() for p in self._references.tensors()) if self._references.bound else 0
        alpha = self._alpha_values
        shown = f"{alpha.item():g}" if alpha.dim() == 0 else "by prefix"
        return f"{len(self._references)} parameters, {numel:,} elements, alpha={shown}, n_anchors={self._n_anchors}"

    # ---- groups ----------------------------------------------------------------------------------------------------

    def _active_groups(self, active: Sequence[str] | None) -> list[ParamGroup]:
        """Return the groups of an active set, after checking that the parameters are where they were."""
        key = None if active is None else tuple(active)
        if not torch.compiler.is_compiling() and self._alpha_values._version != self._alpha_version:
            self._alpha_changed()  # somebody wrote to wpl.alpha
        return self._groups.find(key) or self._make_groups(key, self._references.chosen(active))

    def _make_groups(self, key: tuple[str, ...] | None, names: Sequence[str]) -> list[ParamGroup]:
        """Make the groups of an active set, from anchors beside the parameters."""
        if torch.compiler.is_compiling():
            raise RuntimeError("evaluate this active set once before it is compiled: addresses cannot be traced")
        indices = [self._references.index[name] for name in names]
        with torch.inference_mode(False):
            anchors = self._current_anchors()
            parts = self._references, anchors, self._alpha_values, self._l2_value
            return self._groups.make(key, indices, *parts)

    def _kept(self, sources: Sequence[int]) -> None:
        """Keep the strengths of the parameters that are kept."""
        if self._alpha_values.dim() == 1:
            with torch.inference_mode(False):
                self._alpha_values = self._alpha_values[list(sources)]
            self._alpha_version = self._alpha_values._version

    def _anchors_changed(self) -> None:
        """Make the groups of all known active sets anew, so that compiled code need not."""
        keys = self._groups.clear()
        if self._anchors is not None:
            for key in (*keys, *(() if None in keys else (None,))):
                names = self._references.names if key is None else key
                if all(name in self._references for name in names):
                    self._make_groups(key, names)

    def _alpha_changed(self) -> None:
        """Bring alpha to the groups."""
        self._alpha_version = self._alpha_values._version
        for group in self._groups:
            group.set_alpha(self._alpha_values)

    # ---- before the first anchor -----------------------------------------------------------------------------------

    def _blank_anchors(self) -> Anchors | None:
        """Return anchors that do not hold, where there is a weight decay term to evaluate."""
        with torch.inference_mode(False), torch.no_grad():
            return Anchors(self._references.tensors(), self._fisher_dtype) if self._l2_value else None

    def _nothing(self, active: Sequence[str] | None) -> Tensor:
        """Return the value of no term at all."""
        self._references.chosen(active)
        first = self._references.tensors()[0]
        return torch.zeros((), dtype=flat_dtype(first.dtype), device=first.device)


class Subset:
    """The penalty over a fixed set of names; see :meth:`WeightPlasticityLoss.subset`.

    Iterating over it yields the names with their parameters, as ``params`` takes them.
    """

    def __init__(self, penalty: WeightPlasticityLoss, names: tuple[str, ...]) -> None:
        """Refer to a penalty."""
        self.penalty, self.names = penalty, names

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield pairs of name and parameter.

        Raises:
            NameMismatchError: if the penalty dropped a name since.
        """
        references = self.penalty._references
        names, tensors = references.chosen(self.names), references.tensors()
        return ((name, tensors[references.index[name]]) for name in names)

    def __call__(self) -> Tensor:
        """Return the penalty over the names."""
        value: Tensor = self.penalty(active=self.names)
        return value

    def add_grad_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add its gradient; see :meth:`WeightPlasticityLoss.add_grad_`."""
        return self.penalty.add_grad_(scale, active=self.names)
