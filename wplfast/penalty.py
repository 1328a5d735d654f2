"""``WeightPlasticityLoss``: the penalty as a module that holds no parameters of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import functional, storage
from .anchor_state import Faults, faults, from_state, has_anchors, to_state
from .anchors import Anchors
from .coefficients import Alpha, alpha_tensor
from .consolidation import Normalization, Options, Rule, consolidate_
from .errors import NameMismatchError, StaleParameterError
from .parameters import Params, device_of
from .references import References
from .tables import Table, Tables

#: A change of F by less than half a unit in bfloat16's last place (2^-9) is rounded away.
_LEAST_BFLOAT16_RATE = 2**-7


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
        fisher_dtype: how F is kept: float32 (the default), or bfloat16, which halves its memory and traffic and rounds
            every entry by up to 2^-9 = 0.2%, once for each :meth:`consolidate`. F of float64 parameters is float64.

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
        of
    one model it is EWC, arXiv:1612.00796.
    """

    def __init__(
        self, params: Params, alpha: Alpha = 1.0, *, l2: float = 0.0, fisher_dtype: torch.dtype | None = None
    ) -> None:
        """See the class."""
        super().__init__()
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be finite and not negative, got {l2}")
        self._references = References(params)
        self._l2_value = float(l2)
        self._alpha_values: Tensor = alpha_tensor(alpha, self._references.names, device_of(self._references.tensors()))
        self._fisher_dtype = _checked_fisher_dtype(fisher_dtype)
        self._anchors: Anchors | None = None
        self._n_anchors = 0
        self._tables = Tables()

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
        return functional.total([table.value() for table in self._active_tables(active)])

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
            return functional.total([table.add_grad_(scale) for table in self._active_tables(active)])

    def subset(self, names: Sequence[str]) -> Subset:
        """Return a handle to the penalty over some parameters, for hot loops.

        Args:
            names: of the parameters; each once.

        Returns:
            A callable with ``add_grad_``, like the penalty itself.

        Raises:
            NameMismatchError: if a name is unknown.
        """
        handle = Subset(self, tuple(self._references.chosen(names)))
        if self._anchors is not None:
            self._active_tables(handle.names)
        return handle

    # ---- anchors ---------------------------------------------------------------------------------------------------

    def consolidate(
        self,
        fisher: Mapping[str, Tensor],
        *,
        theta_hat: Mapping[str, Tensor] | None = None,
        weight: float = 1.0,
        decay: float = 1.0,
        anchor: Rule = "merge",
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
        with torch.inference_mode(False), torch.no_grad():
            anchors, first = self._current_anchors(), self._anchors is None
            indices = [self._references.index[name] for name in names]
            theta = [self._references.tensors()[i] for i in indices]
            outdated = consolidate_(anchors, indices, names, theta, fisher, theta_hat, prefix, options, first)
        self._anchors, self._n_anchors = anchors, 1 if anchor == "replace" else self._n_anchors + 1
        if outdated or first:
            self._refresh_tables()

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
            raise ValueError(f"F in bfloat16 would not move at a rate below {_LEAST_BFLOAT16_RATE}, got {rate}")
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
        self._anchors, self._n_anchors = None, 0
        self._tables.clear()

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
        if self._alpha_values.dim() == 1:
            self._alpha_values = self._alpha_values[sources]
        self._anchors, self._references = anchors, references
        self._refresh_tables()

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The accumulated Fisher by name (views; do not write to them); empty before the first consolidate."""
        return {} if self._anchors is None else dict(zip(self._references.names, self._anchors.fisher, strict=True))

    @property
    def theta_hat(self) -> dict[str, Tensor]:
        """The newest anchor by name (views; do not write to them); empty before the first consolidate."""
        return {} if self._anchors is None else dict(zip(self._references.names, self._anchors.theta_hat, strict=True))

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
        values = alpha_tensor(value, self._references.names, device_of(self._references.tensors()))
        same_form = values.shape == self._alpha_values.shape
        if same_form:
            self._alpha_values.copy_(values)
            for table in self._tables:
                table.alpha.copy_(values if values.dim() == 0 else values[table.indices])
        else:
            self._alpha_values = values
            self._refresh_tables()

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
        return to_state(self._references.names, self._anchors, self._n_anchors)

    def _restore(self, state: Mapping[str, Tensor]) -> Faults:
        """Take anchors over unless something is wrong with them."""
        parameters = dict(zip(self._references.names, self._references.tensors(), strict=True))
        found = faults(state, {name: p.shape for name, p in parameters.items()})
        if not found:
            with torch.inference_mode(False), torch.no_grad():
                anchors = from_state(state, parameters, self._fisher_dtype) if has_anchors(state) else None
            self._anchors, self._n_anchors = anchors, int(state["n_anchors"])
            self._refresh_tables()
        return found

    def _apply(self, fn: Any, recurse: bool = True) -> WeightPlasticityLoss:
        """Ignore ``.to`` and the like: the anchors follow the parameters, and F keeps its dtype."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Pickle names and anchors, not the parameters: a copy elsewhere must be bound to parameters there."""
        return {**self.__dict__, "_tables": Tables()}

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightPlasticityLoss:
        """Copy the anchors; refer to copied parameters where the same deepcopy copied them, else to the same ones."""
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(self.__dict__, _references=self._references.copied(memo), _tables=Tables())
        copy._alpha_values = self._alpha_values.clone()
        if self._anchors is not None:
            copy._anchors = self._anchors.moved(self._anchors.theta_hat)
        return copy

    def extra_repr(self) -> str:
        """Summarise."""
        numel = sum(p.numel() for p in self._references.tensors()) if self._references.bound else 0
        alpha = self._alpha_values
        shown = f"{alpha.item():g}" if alpha.dim() == 0 else "by prefix"
        return f"{len(self._references)} parameters, {numel:,} elements, alpha={shown}, n_anchors={self._n_anchors}"

    # ---- tables ----------------------------------------------------------------------------------------------------

    def _active_tables(self, active: Sequence[str] | None) -> list[Table]:
        """Return the tables of an active set, after checking that the parameters are where they were."""
        key = None if active is None else tuple(active)
        return self._tables.find(key) or self._make_tables(key, self._references.chosen(active))

    def _make_tables(self, key: tuple[str, ...] | None, names: Sequence[str]) -> list[Table]:
        """Make the tables of an active set, from anchors beside the parameters."""
        if torch.compiler.is_compiling():
            raise RuntimeError("evaluate this active set once before it is compiled: addresses cannot be traced")
        indices = [self._references.index[name] for name in names]
        with torch.inference_mode(False):
            anchors = self._current_anchors()
            parts = self._references, anchors, self._alpha_values, self._l2_value
            return self._tables.make(key, indices, *parts)

    def _refresh_tables(self) -> None:
        """Make the tables of all known active sets anew, so that compiled code need not."""
        keys = self._tables.clear()
        if self._anchors is not None:
            for key in (*keys, *(() if None in keys else (None,))):
                names = self._references.names if key is None else key
                if all(name in self._references for name in names):
                    self._make_tables(key, names)

    def _current_anchors(self) -> Anchors:
        """Return the anchors, brought to where the parameters are now; new ones if there are none yet.

        Raises:
            StaleParameterError: if a parameter changed its shape.
        """
        theta = self._references.tensors()
        if self._anchors is None:
            return Anchors(theta, self._fisher_dtype)
        if not self._anchors.fits(theta):
            for name, parameter, fisher in zip(self._references.names, theta, self._anchors.fisher, strict=True):
                if parameter.shape != fisher.shape:
                    expected, got = list(fisher.shape), list(parameter.shape)
                    raise StaleParameterError(
                        f"{name!r} had shape {expected} when it was anchored and now has {got}; use rebind or reset"
                    )
            self._anchors = self._anchors.moved(theta)
            self._tables.clear()
        return self._anchors

    # ---- before the first anchor -----------------------------------------------------------------------------------

    def _decay_term(self, active: Sequence[str] | None) -> Tensor:
        """Return the l2 term alone."""
        theta = [self._references.tensors()[self._references.index[name]] for name in self._references.chosen(active)]
        if self._l2_value == 0:
            return torch.zeros((), device=theta[0].device)
        return functional.total([0.5 * self._l2_value * p.square().sum() for p in theta])

    def _add_decay_(self, scale: float | Tensor, active: Sequence[str] | None) -> Tensor:
        """Add the l2 term's gradient."""
        if self._l2_value:
            for name in self._references.chosen(active):
                parameter = self._references.tensors()[self._references.index[name]]
                if parameter.requires_grad:
                    step = parameter.detach() * (self._l2_value * scale)
                    parameter.grad = step.to(parameter) if parameter.grad is None else parameter.grad.add_(step)
        return self._decay_term(active)


def _checked_fisher_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return bfloat16, or None for the default."""
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"fisher_dtype must be torch.float32 or torch.bfloat16, got {dtype}")
    return dtype if dtype == torch.bfloat16 else None


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
