"""``WeightPlasticityLoss``: the penalty as a module that holds no parameters of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..distributed.replicas import check_replicas
from ..fisher.result import Fisher
from ..ops.layout import flat_dtype
from ..params import Params, device_of
from .anchors import Anchors
from .attach import attach
from .autograd import total
from .coefficients import Alpha, alpha_tensor, check_order
from .consolidate import AnchorRule, Extra, Normalization, Options, check_extra, check_mapping, newer_anchor
from .param_groups import ActiveSet, ParamGroup, ParamGroups
from .references import References, listed
from .said import FROZEN, IN_LOSS, TWICE, UNANCHORED, ZERO_FISHER, Said
from .saved import Saved
from .subset import Subset

#: F in bfloat16 stops moving where rate times its distance from the target is below 2^-8 of it: here, at 6%.
_LEAST_BFLOAT16_RATE = 2**-4


class WeightPlasticityLoss(Saved):
    """``alpha/2 sum_i F_i (theta_i - theta_hat_i)^2 + l2/2 |theta|^2`` over shared parameters.

    The module refers to the parameters without owning them: ``wpl.parameters()`` is empty, and as a submodule it adds
    only its anchors to ``state_dict``. It never copies them either; each call checks that they are where they were, and
    follows them to another device, dtype or address. A parameter that a module replaced, lost or got since is an error
    that asks for :meth:`rebind`.

    Args:
        params: the shared parameters: a module (those that require grad), a mapping or (name, tensor) pairs.
        alpha: strength of the anchor; a float, a 0-d tensor, or {prefix: float} (the longest matching prefix counts, ""
            matches all). What counts is alpha times F, so search over ``alpha * fisher.flat.mean()``, by decades around
            1. An F made of squared batch gradients is smaller by up to the batch size, and its alpha larger.
        l2: strength of a plain weight decay term over the same parameters.
        fisher_dtype: how F is kept: float32 (the default), or bfloat16, which halves its memory and traffic and rounds
            every entry by up to 2^-8 = 0.4%, once for each :meth:`consolidate`. F of float64 parameters is float64.

    Raises:
        TypeError: if params is of no known form, or alpha no number.
        ValueError: if params is empty, alpha or l2 is negative, not finite or complex, a parameter matches no prefix,
            or fisher_dtype is another one.

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
        super().__init__()
        if fisher_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"fisher_dtype must be torch.float32 or torch.bfloat16, got {fisher_dtype}")
        check_order(params, alpha)
        references = References(params)
        if not 0 <= l2 < float("inf"):
            raise ValueError(f"l2 must be finite and not negative, got {l2}")
        self._fisher_dtype = fisher_dtype if fisher_dtype == torch.bfloat16 else None
        strength = alpha_tensor(alpha, references.names, device_of(references.tensors()))
        self._alpha, self._said = _kept(alpha), Said()
        self._groups = ParamGroups(references, self._blank(references, l2), strength, float(l2))
        if hasattr(params, "_metadata") and not any(p.requires_grad for p in references.tensors()):
            self._said.warn(FROZEN)  # a state_dict

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def forward(self, active: Sequence[str] | None = None) -> Tensor:
        """Return the penalty.

        Args:
            active: names to restrict it to; default: all.

        Returns:
            A 0-d tensor, float32 or wider, differentiable with respect to the parameters. Before any
            :meth:`consolidate` it is the l2 term alone.

        Raises:
            TypeError: if active is no sequence of names.
            NameMismatchError: if an active name is unknown.
            StaleParameterError: if a parameter changed its shape, lost its memory, or was replaced in its module.
        """
        key = None if active is None else listed(active)
        if self._groups.anchors is None or key == ():
            return self._nothing(key)
        groups = self._active_groups(key)
        self._say_what_is_not_there(groups, torch.is_grad_enabled())
        value = total([group.value() for group in groups])
        return value if self._attached is None else self._watched(value, key)

    def add_grad_(self, scale: float | Tensor = 1.0, active: Sequence[str] | None = None) -> Tensor:
        """Add ``scale`` times the penalty's gradient to the parameters' ``.grad`` in one pass, without a graph.

        Use it after ``backward``, all-reduce, unscaling and clipping, once a step; under DDP it is the way.
        :meth:`attach` lets an optimizer do so. ``.grad`` is allocated where it is None, in the parameter's
        ``grad_dtype`` where that was set; parameters that do not require grad are left alone.

        Args:
            scale: factor; a float or a 0-d tensor.
            active: names to restrict it to; default: all.

        Returns:
            The penalty (not scaled), 0-d, without a graph and without a host synchronisation.

        Raises:
            TypeError: if active is no sequence of names.
            NameMismatchError: if an active name is unknown.
            StaleParameterError: if a parameter changed its shape, lost its memory, or was replaced in its module.
            ValueError: if a ``.grad`` has another dtype (than ``grad_dtype``) or layout than its parameter, or two
                overlap; nothing is added.
        """
        with torch.no_grad():
            key = None if active is None else listed(active)
            if self._groups.anchors is None or key == ():
                return self._nothing(key)
            groups = self._active_groups(key)
            self._say_what_is_not_there(groups, True)
            if self._attached is not None and not self._attached.is_adding and self._is_added_too(TWICE, key):
                self._said.warn(TWICE)
            if len(groups) > 1:  # or an error in a later one would leave the earlier ones added
                for group in groups:
                    group.check_parameter_grads()
            return total([group.add_grad_(scale) for group in groups])

    def subset(self, names: Sequence[str]) -> Subset:
        """Return a handle to the penalty over some parameters, for hot loops.

        Args:
            names: of the parameters; each once.

        Returns:
            A callable with ``add_grad_``, like the penalty itself; ``fisher_diagonal(..., params=handle)`` takes it.

        Raises:
            NameMismatchError: if a name is unknown.
        """
        handle = Subset(self, tuple(self._groups.references.chosen(names)))
        if self._groups.anchors is not None:
            self._active_groups(handle.names)
        return handle

    @property
    def alpha(self) -> Tensor:
        """Strength of the anchor: 0-d float64, or one entry per parameter if it was given by prefix.

        Setting it, or writing to it, changes the value in place: compiled code and CUDA graphs see it without being
        built anew (writing to entries by prefix, from the next call outside of them on). What is set is checked, which
        waits for a GPU where it is a tensor there; what is written is not.
        """
        return self._groups.alpha

    @alpha.setter
    def alpha(self, value: Alpha) -> None:
        groups = self._groups
        tensors = groups.references.parts()
        values = alpha_tensor(value, groups.references.names, device_of(tensors))
        if values.shape == groups.alpha.shape:
            groups.alpha.copy_(values)
            groups.take_alpha()
        else:
            with torch.inference_mode(False):
                anchors = None if groups.anchors is None else groups.anchors_beside(tensors)
            self._commit(ParamGroups(groups.references, anchors, values, groups.l2, groups.active_sets))
        self._alpha = _kept(value)

    @property
    def l2(self) -> float:
        """Strength of the weight decay term; it cannot be set."""
        return self._groups.l2

    # ---- anchors ---------------------------------------------------------------------------------------------------

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
        extra: Extra = "error",
    ) -> None:
        """Anchor the parameters where they are now, with a Fisher that says how much each one matters.

        An interrupt or an error leaves all anchors as they were, or (an interrupt at the very end) all as they become.

        Where there is a process group of several ranks, F and anchors must be the same on all: each rank waits up to
        ten seconds for the others to consolidate, too. A rank that has a penalty alone, or one of its own, does so
        within :func:`wplfast.distributed.local`.

        Args:
            fisher: diagonals by name (:func:`wplfast.fisher_diagonal` or any mapping). A Fisher of this process is
                matched by the identity of the parameters first, then by name.
            theta_hat: anchors by name; default: those that the Fisher was saved with, or the current values.
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
            extra: what to do about names of fisher that the penalty does not cover (with a prefix: names under it),
                whose F would be lost: raise an error, or ``"ignore"`` them.

        Raises:
            TypeError: if fisher or theta_hat is no mapping.
            NameMismatchError: if a name is missing, or left over.
            StaleParameterError: if a parameter was replaced in its module, or the module got another one.
            WplfastError: if F differs from that of another rank whose anchors are the same, or either does where the
                parameters are wrapped in DistributedDataParallel, or F was reduced.
            ValueError: if a shape does not fit, a Fisher is negative or more than its dtype holds, or an option is out
                of range.
            NonFiniteError: if a Fisher or an anchor has NaN or inf.
        """
        options = Options(weight, decay, anchor, normalize, clip_norm)
        check_mapping(fisher, "fisher")
        if theta_hat is not None:
            check_mapping(theta_hat, "theta_hat")
        groups = self._groups
        references = groups.references
        names = references.chosen(active)
        if not names:
            raise ValueError("active must name at least one parameter, got none")
        with torch.inference_mode(False), torch.no_grad(), references.together("consolidate"):
            tensors, indices = references.tensors(), [references.index[name] for name in names]
            parameters, parts = {name: tensors[i] for name, i in zip(names, indices, strict=True)}, references.parts()
            if self.n_anchors == 0:
                anchors = Anchors(parts, self._fisher_dtype)
            else:
                anchors = groups.anchors_beside(parts, indices if groups.outlast(options) else None)
            newer = newer_anchor(parameters, fisher, theta_hat, prefix, options)
            check_extra(fisher, newer.keys, references, prefix, extra)
            if not references.is_sharded:
                known = references.are_replicas or (isinstance(fisher, Fisher) and fisher.reduced)
                check_replicas(names, newer.fisher, newer.theta_hat, known, fisher)
            in_place = anchors is not groups.anchors
            anchors, change = anchors.consolidated(indices, newer, options, in_place)
            self._commit(groups.with_anchors(anchors), change)
        self._said.hush(UNANCHORED)
        if not any(newer.largest):
            self._said.warn(ZERO_FISHER)

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
        extra: Extra = "error",
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
            extra: what to do about names of fisher that the penalty does not cover.

        Raises:
            TypeError: as :meth:`consolidate`, as for the others.
            NameMismatchError: if a name is missing, or left over.
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
            extra=extra,
        )

    def reset(self) -> None:
        """Forget all anchors; alpha and l2 stay."""
        groups = self._groups
        anchors = self._blank(groups.references, groups.l2)
        self._commit(ParamGroups(groups.references, anchors, groups.alpha, groups.l2, groups.active_sets))

    def rebind(
        self,
        params: Params,
        *,
        new: Literal["error", "add"] = "error",
        missing: Literal["error", "drop"] = "error",
    ) -> None:
        """Refer to other tensors by the same names: after loading or unpickling, or when the model grew.

        A parameter may have become larger in any dimension, as a classifier's head does with new classes: its old
        entries keep their anchor, new ones are free (F = 0).

        Args:
            params: tensors by name. A module's parameters are those that require grad, and frozen ones that this
                penalty covers.
            new: what to do about names that this penalty does not cover: raise an error, or let them join it. They are
                free until the next :meth:`consolidate`; an alpha by prefix must match them.
            missing: what to do about names that params lacks: raise an error, or drop them from the penalty.

        Raises:
            NameMismatchError: if a name is new or missing, or none is left.
            ValueError: if a parameter became smaller or has another number of dimensions, or an option is unknown.
        """
        for what, value, other in (("new", new, "add"), ("missing", missing, "drop")):
            if value not in ("error", other):
                raise ValueError(f"{what} must be 'error' or {other!r}, got {value!r}")
        groups = self._groups
        references = groups.references.again(params, new, missing)
        self._commit(groups.rebound(references, lambda names: alpha_tensor(self._alpha, names, groups.alpha.device)))

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Let an optimizer add the penalty's gradient to ``.grad`` at the start of each ``step()``.

        It calls :meth:`add_grad_` for the parameters that the optimizer holds: after clipping, and under a
        ``GradScaler`` after unscaling. ``step(closure)`` adds it after each call of the closure, and the penalty to the
        loss that it returns, as line searches want. Do not add ``wpl()`` to the loss as well. (A hook of your own must
        return None: ``lambda *_: wpl.add_grad_()`` returns a tensor, which PyTorch refuses.) A copy of the optimizer is
        not attached, as PyTorch copies no hooks.

        Args:
            optimizer: over some of the penalty's parameters, and any others.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            TypeError: if it is no PyTorch optimizer, or wraps one.
            ValueError: if it holds none of the penalty's parameters, now or later at a step, or is attached already.

        Example:
            >>> import torch, wplfast
            >>> w = torch.tensor([1.0], requires_grad=True)
            >>> wpl, sgd = wplfast.WeightPlasticityLoss({"w": w}), torch.optim.SGD([w], lr=0.5)
            >>> wpl.consolidate({"w": torch.ones(1)}, theta_hat={"w": torch.zeros(1)})
            >>> handle = wpl.attach(sgd)
            >>> sgd.step()
            >>> w
            tensor([0.5000], requires_grad=True)
        """
        return attach(self, optimizer)

    @property
    def fisher(self) -> dict[str, Tensor]:
        """The accumulated Fisher by name (views; do not write to them); empty before the first consolidate."""
        return self._by_name("fisher")

    @property
    def theta_hat(self) -> dict[str, Tensor]:
        """The newest anchor by name (views; do not write to them); empty before the first consolidate."""
        return self._by_name("theta_hat")

    def _by_name(self, column: Literal["fisher", "theta_hat"]) -> dict[str, Tensor]:
        """Return one of the anchors' lists by name."""
        groups = self._groups
        if groups.anchors is None or groups.anchors.n_anchors == 0:
            return {}
        return groups.references.placed(getattr(groups.anchors, column))

    def extra_repr(self) -> str:
        """Summarise."""
        references, alpha = self._groups.references, self._groups.alpha
        shown = f"{alpha.item():g}" if alpha.dim() == 0 else "by prefix"
        return (
            f"{len(references)} parameters, {references.numel():,} elements, alpha={shown}, n_anchors={self.n_anchors}"
        )

    # ---- groups ----------------------------------------------------------------------------------------------------

    def _active_groups(self, key: ActiveSet) -> list[ParamGroup]:
        """Return the groups of an active set, after checking that the parameters are where they were."""
        groups = self._groups
        try:
            found = groups.find(key)
        except TypeError:  # an entry that cannot be looked up
            groups.references.chosen(key)
            raise
        if found is not None:
            return found
        groups.references.chosen(key)
        if torch.compiler.is_compiling():
            raise RuntimeError("evaluate this active set once before it is compiled: addresses cannot be traced")
        with torch.inference_mode(False):
            anchors = groups.anchors_beside(groups.references.parts())
            if anchors is not groups.anchors:
                self._commit(groups.with_anchors(anchors))
        return self._groups.make(key)

    def _say_what_is_not_there(self, groups: Sequence[ParamGroup], grad: bool) -> None:
        """Say so, once, if there are no anchors, or no parameter takes the gradient that is wanted."""
        if not self._groups.anchored:
            self._said.warn(UNANCHORED)
        if grad and not groups[0].theta[0].requires_grad:  # the first one mostly does, and that is all it costs
            self._say_if_frozen(groups)

    def _is_added_too(self, message: str, key: ActiveSet) -> bool:
        """Tell whether an optimizer adds an active set's gradient, and that is to be said."""
        if self._attached is None or message in self._said or torch.compiler.is_compiling():
            return False
        return self._attached.holds_any(self._groups.references, key)

    def _watched(self, value: Tensor, key: ActiveSet) -> Tensor:
        """Return a value that says so, once, if it is differentiated though an optimizer adds the gradient."""
        if value.requires_grad and self._is_added_too(IN_LOSS, key) and not torch._C._are_functorch_transforms_active():
            said = self._said
            value.register_hook(lambda _: said.warn(IN_LOSS))
        return value

    def _say_if_frozen(self, groups: Sequence[ParamGroup]) -> None:
        """Say so, once, if no parameter takes a gradient."""
        if FROZEN not in self._said and not any(group.trains() for group in groups):
            self._said.warn(FROZEN)

    def _nothing(self, key: ActiveSet) -> Tensor:
        """Return the value of no term at all."""
        if key != ():
            self._said.warn(UNANCHORED)
        self._groups.references.chosen(key)
        first = self._groups.references.tensors()[0]
        return torch.zeros((), dtype=flat_dtype(first.dtype), device=first.device)


def _kept(alpha: Alpha) -> Alpha:
    """Return alpha as it is kept for parameters that join later."""
    return dict(alpha) if isinstance(alpha, Mapping) else alpha
