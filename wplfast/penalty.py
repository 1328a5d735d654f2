"""``WeightPlasticityLoss``: the penalty as a module that holds no parameters of its own."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from . import functional, storage
from .anchors import Anchor, Group, by_kind, dense_like, pack, signature
from .errors import NameMismatchError, NonFiniteError, StaleParameterError, WplfastError
from .fisher import Fisher
from .ops.layout import is_dense, same_order
from .parameters import Params, check_names, named

Alpha: TypeAlias = float | Tensor | Mapping[str, float]

_STATE_VERSION = 1
_MAX_TABLES = 32  # active sets whose tables are kept


class WeightPlasticityLoss(nn.Module):
    """``alpha/2 sum_i F_i (theta_i - theta_hat_i)^2 + l2/2 |theta|^2`` over shared parameters.

    The module refers to the parameters without owning them: ``wpl.parameters()`` is empty, and as a submodule it adds
    only its anchors to ``state_dict``. It never copies them either; each call checks that they are where they were, and
    follows them to another device, dtype or address.

    Args:
        params: the shared parameters: a module (those that require grad), a mapping or (name, tensor) pairs.
        alpha: strength of the anchor; a float, a 0-d tensor, or {prefix: float} (the longest matching prefix counts, ""
            matches all). Good values depend on F's scale; those of F from a batch-squared gradient are far larger.
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

    Source: Benyahia, Yu et al., "Overcoming Multi-Model Forgetting", ICML 2019, arXiv:1902.08232; with all parameters of
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
        self._alpha_values: Tensor = self._alpha_of(alpha)
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
        return functional.total([_value(group) for group in self._groups(active)])

    @torch.no_grad()
    def add_grad_(self, scale: float | Tensor = 1.0, active: Sequence[str] | None = None) -> Tensor:
        """Add ``scale`` times the penalty's gradient to the parameters' ``.grad`` in one pass, without a graph.

        Use it after ``backward``, all-reduce, unscaling and clipping, once a step; under DDP it is the way. ``.grad`` is
        allocated where it is None; parameters that do not require grad are left alone.

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
        if self._anchors is None:
            return self._add_decay_(scale, active)
        return functional.total([_add_grad_(group, scale) for group in self._groups(active)])

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
            anchor: ``"merge"``: the penalty becomes the exact sum of decay times the old one and the new one, at the cost
                of one. ``"replace"``: one anchor, the newest, with the decayed sum of Fishers (online EWC, and the rule
                of arXiv:1902.08232 for architecture search).
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
        importance = self._look_up(fisher, names, "fisher", prefix)
        values = None if theta_hat is None else self._look_up(theta_hat, names, "theta_hat", prefix)
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
        self._anchors = pack(anchors, theta)
        self._n_anchors = 1 if anchor == "replace" else self._n_anchors + 1
        self._tables.clear()
        self._groups(None)

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
        self._tables.clear()
        if self._anchors is not None:
            self._anchors = pack(self._anchors, theta)
            self._groups(None)

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
        values = self._alpha_of(value)
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
        missing, unexpected, errors = self._restore(state)
        if missing or unexpected:
            raise NameMismatchError(f"{os.fspath(path)}: missing {missing[:6]}, unexpected {unexpected[:6]}")
        if errors:
            raise ValueError("; ".join(errors))

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
        missing, unexpected, errors = self._restore(own)
        missing_keys += [prefix + key for key in missing]
        error_msgs += errors
        if strict:
            unexpected_keys += [prefix + key for key in unexpected]

    def _state(self) -> dict[str, Tensor]:
        """Return the anchors as named tensors."""
        state = {"version": torch.tensor(_STATE_VERSION), "n_anchors": torch.tensor(self._n_anchors)}
        anchors = self._anchors or ()
        for name, anchor in zip(self._names, anchors, strict=False):
            state[f"fisher.{name}"] = anchor.fisher
            state[f"theta_hat.{name}"] = anchor.theta_hat
            if anchor.offset is not None:
                state[f"offset.{name}"] = anchor.offset
        if anchors:
            state["constant"] = torch.tensor([anchor.constant for anchor in anchors], dtype=torch.float64)
        return state

    @torch.no_grad()
    def _restore(self, state: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
        """Take anchors over unless something is wrong; return missing keys, unexpected keys and errors."""
        wanted = {"version", "n_anchors"}
        if int(state.get("n_anchors", torch.tensor(0))) or "constant" in state:
            wanted |= {f"{kind}.{name}" for kind in ("fisher", "theta_hat") for name in self._names} | {"constant"}
        optional = {f"offset.{name}" for name in self._names}
        missing = sorted(wanted - state.keys())
        unexpected = sorted(state.keys() - wanted - optional)
        errors = []
        if "version" in state and int(state["version"]) != _STATE_VERSION:
            errors.append(f"the penalty's state must be of version {_STATE_VERSION}, got {int(state['version'])}")
        theta = self._bound()
        for name, parameter in zip(self._names, theta, strict=True):
            for kind in ("fisher", "theta_hat", "offset"):
                tensor = state.get(f"{kind}.{name}")
                if tensor is not None and tensor.shape != parameter.shape:
                    expected, got = list(parameter.shape), list(tensor.shape)
                    errors.append(f"{kind}[{name!r}] must have shape {expected} as its parameter, got {got}")
        if missing or unexpected or errors:
            return missing, unexpected, errors
        self.reset()
        if "constant" in state:
            constants = state["constant"].tolist()
            anchors = [
                Anchor(state[f"theta_hat.{n}"], state[f"fisher.{n}"], state.get(f"offset.{n}"), constant)
                for n, constant in zip(self._names, constants, strict=True)
            ]
            self._anchors = pack(anchors, theta)
            self._n_anchors = int(state["n_anchors"])
            self._groups(None)
        return missing, unexpected, errors

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
            if all(_unchanged(group) for group in groups):
                self._tables.move_to_end(key)
                return groups
            self._follow()
        groups = self._tables[key] = self._build(self._chosen(active))
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
        self._anchors = pack(anchors, theta)
        self._tables.clear()

    def _build(self, names: Sequence[str]) -> list[Group]:
        """Make the tables of an active set."""
        theta, anchors = self._bound(), self._anchors
        assert anchors is not None
        chosen = [self._index[name] for name in names]
        groups = []
        for (device, _), positions in by_kind([theta[i] for i in chosen]).items():
            indices = [chosen[position] for position in positions]
            several = any(anchors[i].offset is not None for i in indices)
            alpha = self._alpha_values if self._alpha_values.dim() == 0 else self._alpha_values[indices]
            constants = torch.tensor([anchors[i].constant for i in indices], dtype=torch.float64, device=device)
            if alpha.dim() == 0:
                constants = constants.sum()
            groups.append(
                Group(
                    indices,
                    [theta[i] for i in indices],
                    [anchors[i].theta_hat for i in indices],
                    [a for i in indices if (a := anchors[i].offset) is not None] if several else [],
                    [anchors[i].fisher for i in indices],
                    alpha.to(device, copy=True),
                    torch.full((), self._l2_value, dtype=torch.float64, device=device),
                    constants if several else None,
                    [signature(theta[i]) for i in indices],
                    [k for k, i in enumerate(indices) if not is_dense(theta[i])],
                )
            )
        return groups

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
            return pack([_nothing(p) for p in self._bound()], self._bound())
        if not all(_unchanged(group) for group in self._groups(None)):
            self._follow()
        return list(self._anchors)

    def _look_up(self, mapping: Mapping[str, Tensor], names: Iterable[str], what: str, prefix: str) -> dict[str, Tensor]:
        """Find every name's tensor: by the identity of the parameter, then by name; check shape and values."""
        names = list(names)
        theta = self._bound()
        by_identity = mapping.names_of(theta) if isinstance(mapping, Fisher) and not prefix else {}
        keys = {name: by_identity.get(self._index[name], prefix + name) for name in names}
        check_names(mapping, keys.values(), what)
        found = {}
        for name, key in keys.items():
            tensor, parameter = mapping[key], theta[self._index[name]]
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.shape != parameter.shape:
                got = f"{tensor.dtype}{list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"{what}[{key!r}] must have shape {list(parameter.shape)}, got {got}")
            tensor = tensor.detach()
            if tensor.numel():
                low, high = tensor.aminmax()
                if not bool(torch.isfinite(low) & torch.isfinite(high)):
                    raise NonFiniteError(f"{what}[{key!r}] has NaN or inf")
                if what == "fisher" and bool(low < 0):
                    raise ValueError(f"fisher[{key!r}] must not be negative, got a least entry of {low.item():g}")
            found[name] = tensor
        return found

    def _alpha_of(self, alpha: Alpha) -> Tensor:
        """Bring alpha to its inner form: float64, 0-d or one entry per parameter."""
        device = self._bound()[0].device
        if isinstance(alpha, Mapping):
            values = []
            for name in self._names:
                fitting = [prefix for prefix in alpha if name.startswith(prefix)]
                if not fitting:
                    raise ValueError(f"alpha has no prefix for {name!r}: got {sorted(alpha)}; '' matches all")
                values.append(float(alpha[max(fitting, key=len)]))
            result = torch.tensor(values, dtype=torch.float64, device=device)
        elif isinstance(alpha, Tensor):
            if alpha.dim():
                raise ValueError(f"alpha must be a float, a 0-d tensor or a mapping, got shape {list(alpha.shape)}")
            return alpha.detach().to(device, torch.float64, copy=True)
        else:
            result = torch.full((), float(alpha), dtype=torch.float64, device=device)
        if not bool(((result >= 0) & torch.isfinite(result)).all()):
            raise ValueError(f"alpha must be finite and not negative, got {alpha}")
        return result

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


def _nothing(parameter: Tensor) -> Anchor:
    """Return an anchor that does not hold: F = 0 at the current value."""
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return Anchor(parameter.detach(), torch.zeros_like(parameter, dtype=wide))


def _unchanged(group: Group) -> bool:
    """Tell whether the parameters of a table are what and where they were."""
    for p, (address, dtype, device, shape, stride) in zip(group.theta, group.signatures, strict=True):
        if p.data_ptr() != address or p.dtype != dtype or p.stride() != stride or p.shape != shape:
            return False
        if p.device != device:
            return False
    return True


def _value(group: Group) -> Tensor:
    """Return one group's differentiable value."""
    theta = group.theta
    if group.sparse:
        theta = [p.contiguous() if k in group.sparse else p for k, p in enumerate(theta)]
    value = functional.penalty(theta, group.theta_hat, group.offset, group.fisher, group.alpha, group.l2)
    return _with_constant(value, group)


def _add_grad_(group: Group, scale: float | Tensor) -> Tensor:
    """Add one group's gradient and return its value."""
    theta = [dense_like(p) for p in group.theta] if group.sparse else group.theta
    grads, scratch = [], []
    for k, p in enumerate(group.theta):
        grad = p.grad
        if not p.requires_grad:
            grad = torch.zeros_like(theta[k])
        elif grad is None:
            grad = p.grad = torch.zeros_like(p)
        elif grad.dtype != p.dtype or grad.layout != torch.strided:
            raise ValueError(f".grad must be dense and {p.dtype} as its parameter, got {grad.layout} {grad.dtype}")
        if group.sparse or not same_order(grad, p) or not is_dense(grad):
            scratch.append((grad, torch.zeros_like(theta[k])))
            grad = scratch[-1][1]
        grads.append(grad)
    factor = functional.scalar(scale, theta[0].device)
    value: Tensor = torch.ops.wplfast.penalty_add_grad_(
        grads, theta, group.theta_hat, group.offset, group.fisher, group.alpha, group.l2, factor
    )
    for grad, extra in scratch:
        grad.add_(extra)
    return _with_constant(value, group)


def _with_constant(value: Tensor, group: Group) -> Tensor:
    """Add what the merged anchors contribute whatever theta is."""
    if group.constant is None:
        return value
    return value + (0.5 * group.alpha * group.constant).sum().to(value.dtype)


__all__ = ["Alpha", "Subset", "WeightPlasticityLoss", "WplfastError"]
