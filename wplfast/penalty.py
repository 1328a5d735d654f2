"""``WeightPlasticityLoss``: the penalty as a module that holds no parameters of its own."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional, storage
from .anchors import Anchor, Restored, from_state, nothing, pack, to_state
from .coefficients import Alpha, alpha_tensor
from .errors import NameMismatchError, StaleParameterError
from .lookup import look_up
from .parameters import Params, check_names, device_of, named
from .tables import Group, add_grad_, build, unchanged, value_of

_MAX_TABLES = 32  # active sets whose tables are kept


class WeightPlasticityLoss(nn.Module):
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

    Raises:
        TypeError: if params is of no known form.
        ValueError: if params is empty, alpha or l2 is negative or not finite, or a parameter matches no prefix.

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
        of
    one model it is EWC, arXiv:1612.00796.
    """

    def __init__(self, params: Params, alpha: Alpha = 1.0, *, l2: float = 0.0) -> None:
        """See the class."""
        super().__init__()
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be finite and not negative, got {l2}")
        parameters = named(params)
        self._names = list(parameters)
        self._theta: list[Tensor] | None = list(parameters.values())
        self._index = {name: i for i, name in enumerate(self._names)}
        self._l2_value = float(l2)
        self._alpha_values: Tensor = alpha_tensor(alpha, self._names, device_of(self._bound()))
        self._anchors: list[Anchor] | None = None
        self._n_anchors = 0
        self._tables: OrderedDict[tuple[str, ...] | None, list[Group]] = OrderedDict()

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
            StaleParameterError: if a parameter changed its shape.
        """
        if self._anchors is None:
            return self._decay_term(active)
        return functional.total([value_of(group) for group in self._groups(active)])

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
            StaleParameterError: if a parameter changed its shape.
            ValueError: if a ``.grad`` has another dtype or layout than its parameter.
        """
        with torch.no_grad():
            if self._anchors is None:
                return self._add_decay_(scale, active)
            return functional.total([add_grad_(group, scale) for group in self._groups(active)])

    def subset(self, names: Sequence[str]) -> Subset:
        """Return a handle to the penalty over some parameters, for hot loops.

        Raises:
            NameMismatchError: if a name is unknown.
        """
        check_names(self._names, names, "the penalty")
        return Subset(self, tuple(names))

    # ---- anchors ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def consolidate(
        self,
        fisher: Mapping[str, Tensor],
        *,
        theta_hat: Mapping[str, Tensor] | None = None,
        weight: float = 1.0,
        decay: float = 1.0,
        anchor: Literal["merge", "replace"] = "merge",
        active: Sequence[str] | None = None,
        prefix: str = "",
    ) -> None:
        """Anchor the parameters where they are now, with a Fisher that says how much each one matters.

        Args:
            fisher: diagonals by name (:func:`wplfast.fisher_diagonal` or any mapping). A Fisher of this process is
                matched by the identity of the parameters first, then by name.
            theta_hat: anchors by name; default: the current values.
            weight: factor on this Fisher.
            decay: factor on what was there before.
            anchor: ``"merge"``: the penalty becomes the exact sum of decay times the old one and the new one, at the
                cost of one. ``"replace"``: one anchor, the newest, with the decayed sum of Fishers (online EWC, and the
                rule of arXiv:1902.08232 for architecture search).
            active: names to consolidate; all others keep what they have.
            prefix: put before every name when it is looked up.

        Raises:
            NameMismatchError: if a name is missing.
            ValueError: if a shape does not fit, a Fisher is negative, or an option is out of range.
            NonFiniteError: if a Fisher or an anchor has NaN or inf.
        """
        if anchor not in ("merge", "replace"):
            raise ValueError(f"anchor must be 'merge' or 'replace', got {anchor!r}")
        for what, value in (("weight", weight), ("decay", decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{what} must be finite and not negative, got {value}")
        names = self._chosen(active)
        theta = self._bound()
        importance = look_up(fisher, names, theta, self._index, "fisher", prefix)
        values = None if theta_hat is None else look_up(theta_hat, names, theta, self._index, "theta_hat", prefix)
        anchors = self._current_anchors()
        for name in names:
            index = self._index[name]
            old, dtype = anchors[index], anchors[index].fisher.dtype
            new_fisher = importance[name].to(old.fisher.device, dtype) * weight
            new_hat = theta[index].detach() if values is None else values[name].to(old.theta_hat)
            if anchor == "merge" and self._anchors is not None:
                anchors[index] = old.merge(new_hat, new_fisher, decay)
            else:
                anchors[index] = Anchor(new_hat, old.fisher * decay + new_fisher)
        self._set_anchors(anchors, 1 if anchor == "replace" else self._n_anchors + 1)

    def reset(self) -> None:
        """Forget all anchors; alpha and l2 stay."""
        self._anchors, self._n_anchors = None, 0
        self._tables.clear()

    def rebind(self, params: Params) -> None:
        """Refer to other tensors by the same names, for instance after loading a model or unpickling.

        Args:
            params: holds every name of this penalty, with the same shapes; other names are ignored.

        Raises:
            NameMismatchError: if a name is missing.
            ValueError: if a shape differs.
        """
        parameters = named(params)
        check_names(parameters, self._names, "params")
        theta = [parameters[name] for name in self._names]
        for name, parameter, anchor in zip(self._names, theta, self._anchors or (), strict=False):
            if parameter.shape != anchor.fisher.shape:
                expected, got = list(anchor.fisher.shape), list(parameter.shape)
                raise ValueError(f"params[{name!r}] must have shape {expected} as its anchor, got {got}")
        self._theta = theta
        if self._anchors is not None:
            self._set_anchors(self._anchors, self._n_anchors)

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The accumulated Fisher by name (views; do not write to them); empty before the first consolidate."""
        return {name: anchor.fisher for name, anchor in zip(self._names, self._anchors or (), strict=False)}

    @property
    def theta_hat(self) -> dict[str, Tensor]:
        """The newest anchor by name (views; do not write to them); empty before the first consolidate."""
        return {name: anchor.theta_hat for name, anchor in zip(self._names, self._anchors or (), strict=False)}

    @property
    def n_anchors(self) -> int:
        """Number of anchors that the penalty is the sum of."""
        return self._n_anchors

    @property
    def alpha(self) -> Tensor:
        """Strength of the anchor: 0-d float64, or one entry per parameter if it was given by prefix.

        Setting it changes the value in place: compiled code and CUDA graphs see it without being built anew.
        """
        return self._alpha_values

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        values = alpha_tensor(value, self._names, device_of(self._bound()))
        same_form = values.shape == self._alpha_values.shape
        for group in (group for groups in self._tables.values() for group in groups):
            if same_form:
                group.alpha.copy_(values if values.dim() == 0 else values[group.indices])
        if same_form:
            self._alpha_values.copy_(values)
        else:
            self._alpha_values = values
            self._tables.clear()

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
            destination[prefix + key] = tensor

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
        found = self._restore(own)
        missing_keys += [prefix + key for key in found.missing]
        error_msgs += found.errors
        if strict:
            unexpected_keys += [prefix + key for key in found.unexpected]

    def _state(self) -> dict[str, Tensor]:
        """Return the anchors as named tensors."""
        return to_state(self._names, self._anchors or (), self._n_anchors)

    def _restore(self, state: Mapping[str, Tensor]) -> Restored:
        """Take anchors over unless something is wrong with them."""
        theta = self._bound()
        restored = from_state(state, dict(zip(self._names, (p.shape for p in theta), strict=True)))
        if restored.whole:
            self.reset()
            if restored.anchors is not None:
                self._set_anchors(restored.anchors, restored.n_anchors)
        return restored

    def _apply(self, fn: Any, recurse: bool = True) -> WeightPlasticityLoss:
        """Ignore ``.to`` and the like: the anchors follow the parameters, and F keeps its dtype."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle names and anchors, not the parameters: a copy elsewhere must be bound to parameters there."""
        state = self.__dict__.copy()
        state["_theta"], state["_tables"] = None, OrderedDict()
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightPlasticityLoss:
        """Copy the anchors; refer to copied parameters where the same deepcopy copied them, else to the same ones."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        state = self.__dict__.copy()
        theta = self._theta
        state["_theta"] = None if theta is None else [memo.get(id(p), p) for p in theta]
        state["_alpha_values"], state["_tables"] = self._alpha_values.clone(), OrderedDict()
        copy.__dict__.update(state)
        if copy._anchors is not None and copy._theta is not None:
            copy._anchors = pack(copy._anchors, copy._theta)
        return copy

    def extra_repr(self) -> str:
        """Summarise."""
        numel = sum(p.numel() for p in self._theta or ())
        alpha = self._alpha_values
        shown = f"{alpha.item():g}" if alpha.dim() == 0 else "by prefix"
        return f"{len(self._names)} parameters, {numel:,} elements, alpha={shown}, n_anchors={self._n_anchors}"

    # ---- tables ----------------------------------------------------------------------------------------------------

    def _groups(self, active: Sequence[str] | None) -> list[Group]:
        """Return the tables of an active set, after checking that the parameters are where they were."""
        key = None if active is None else tuple(active)
        groups = self._tables.get(key)
        if torch.compiler.is_compiling() and groups is not None:
            return groups  # addresses cannot be looked at while tracing; shapes and dtypes are guarded
        if groups is not None:
            if all(unchanged(group) for group in groups):
                self._tables.move_to_end(key)
                return groups
            self._follow()
        anchors, indices = self._anchors, [self._index[name] for name in self._chosen(active)]
        assert anchors is not None
        groups = self._tables[key] = build(indices, self._bound(), anchors, self._alpha_values, self._l2_value)
        if len(self._tables) > _MAX_TABLES:
            self._tables.popitem(last=False)
        return groups

    def _follow(self) -> None:
        """Bring the anchors to where the parameters are now."""
        anchors, theta = self._anchors, self._bound()
        assert anchors is not None
        for name, parameter, anchor in zip(self._names, theta, anchors, strict=True):
            if parameter.shape != anchor.fisher.shape:
                expected, got = list(anchor.fisher.shape), list(parameter.shape)
                raise StaleParameterError(
                    f"{name!r} had shape {expected} when it was anchored and now has {got}; use rebind or reset"
                )
        self._set_anchors(anchors, self._n_anchors)

    def _set_anchors(self, anchors: Sequence[Anchor], n_anchors: int) -> None:
        """Lay the anchors out beside the parameters and make the table of all of them."""
        self._anchors, self._n_anchors = pack(anchors, self._bound()), n_anchors
        self._tables.clear()
        self._groups(None)

    def _bound(self) -> list[Tensor]:
        """Return the parameters.

        Raises:
            StaleParameterError: if there are none since unpickling.
        """
        if self._theta is None:
            raise StaleParameterError("this penalty was unpickled without its parameters; call rebind(params) first")
        return self._theta

    def _chosen(self, active: Sequence[str] | None) -> list[str]:
        """Return the active names, checked."""
        if active is None:
            return self._names
        if isinstance(active, str):
            raise TypeError(f"active must be a sequence of names, got the string {active!r}")
        check_names(self._names, active, "the penalty")
        if len(set(active)) != len(active):
            raise ValueError("active must name each parameter once")
        return list(active)

    def _current_anchors(self) -> list[Anchor]:
        """Return the anchors; for a penalty without any, those of F = 0."""
        if self._anchors is None:
            return pack([nothing(p) for p in self._bound()], self._bound())
        if not all(unchanged(group) for group in self._groups(None)):
            self._follow()
        return list(self._anchors)

    # ---- before the first anchor -----------------------------------------------------------------------------------

    def _decay_term(self, active: Sequence[str] | None) -> Tensor:
        """Return the l2 term alone."""
        theta = [self._bound()[self._index[name]] for name in self._chosen(active)]
        if self._l2_value == 0:
            return torch.zeros((), device=theta[0].device)
        return functional.total([0.5 * self._l2_value * p.square().sum() for p in theta])

    def _add_decay_(self, scale: float | Tensor, active: Sequence[str] | None) -> Tensor:
        """Add the l2 term's gradient."""
        if self._l2_value:
            for name in self._chosen(active):
                parameter = self._bound()[self._index[name]]
                if parameter.requires_grad:
                    step = parameter.detach() * (self._l2_value * scale)
                    parameter.grad = step.to(parameter) if parameter.grad is None else parameter.grad.add_(step)
        return self._decay_term(active)


class Subset:
    """The penalty over a fixed set of names; see :meth:`WeightPlasticityLoss.subset`."""

    def __init__(self, penalty: WeightPlasticityLoss, names: tuple[str, ...]) -> None:
        """Refer to a penalty."""
        self.penalty, self.names = penalty, names

    def __call__(self) -> Tensor:
        """Return the penalty over the names."""
        value: Tensor = self.penalty(active=self.names)
        return value

    def add_grad_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add its gradient; see :meth:`WeightPlasticityLoss.add_grad_`."""
        return self.penalty.add_grad_(scale, active=self.names)
