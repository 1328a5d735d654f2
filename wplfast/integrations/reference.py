"""The interface of ``WPLModule`` of kcyu2014/multi-model-forgetting, the code of arXiv:1902.08232.

One import line changes; where that code squares the gradient of a batch, a ``with`` block takes per-sample gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import NameMismatchError, WplfastError
from ..fisher.accumulator import FisherAccumulator
from ..fisher.undisturbed import Undisturbed
from ..functional import wpl_penalty
from ..ops.layout import flat_dtype
from ..params import device_of, some


class WPLModule(nn.Module):
    """A module whose children are anchored by key, as in architecture search with shared weights.

    Subclasses may set ``wpl_monitored_modules``, a mapping from keys to modules (default: all children), and
    ``ignore_module_keys``. A training loop changes in two places::

        from wplfast.integrations.reference import WPLModule  # was: from models.wpl_module import WPLModule

        loss = ce + 0.5 * shared.compute_weight_plastic_loss_with_update_fisher(keys)
        ...
        with shared.fisher_pass(keys) as batch:  # was: zero_grad(); validation_loss.backward()
            batch.backward(losses_of(shared(inputs, dag), targets))  # one loss per sample, [N]
        shared.update_fisher(keys, epoch)
        shared.update_optimal_weights()

    What is different from that code, unless ``compat=True``: F is the mean of squared per-sample gradients without
    dropout, in place of the square of a batch's mean gradient with it. ``alpha_fisher`` multiplies the penalty, and is
    not multiplied into F, where every update would multiply it again. ``alpha_decay``, which brings the penalty to zero
    for good, is not followed: for a schedule, set ``args.alpha_fisher``. In both: F and anchors survive ``.to()`` and
    are part of ``state_dict`` (one without them changes none); a WPLModule among the children takes part with all its
    keys; an unknown key is an error; a parameter that several keys share counts once; and the penalty is one kernel.

    Args:
        args: has ``alpha_fisher`` (strength), ``lambda_fisher`` (share of the newest F), ``momentum`` (whether the
            older F fades), ``fisher_clip_by_norm`` (of each tensor's F; 0: not); for compat also ``alpha_decay`` and
            ``alpha_decay_after``.
        compat: square ``.grad`` of the last backward, multiply F by the epoch's alpha, and set F of a parameter without
            a gradient to zero, to reproduce numbers of that code.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from wplfast.integrations.reference import WPLModule
        >>> class Net(WPLModule):
        ...     def __init__(self, args):
        ...         super().__init__(args)
        ...         self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> net = Net(SimpleNamespace(alpha_fisher=60.0, lambda_fisher=0.9, momentum=True, fisher_clip_by_norm=0.0))
        >>> with net.fisher_pass(["a"]) as batch:
        ...     batch.backward(net.a(torch.ones(5, 3)).square().sum(1))
        >>> net.update_fisher(["a"])
        2
        >>> net.update_optimal_weights()
        >>> net.compute_weight_plastic_loss_with_update_fisher(["a", "b"]).item()
        0.0

    Source: arXiv:1902.08232.
    """

    def __init__(self, args: Any, compat: bool = False) -> None:
        """See the class."""
        super().__init__()
        self.args, self.compat, self.build = args, compat, False
        self.ignore_module_keys: list[str] = []
        self.wpl_monitored_modules: Mapping[str, nn.Module | None] = self._modules
        self._modules_opt: dict[str, dict[str, Tensor]] = {}
        self._fisher: dict[str, dict[str, Tensor]] = {}
        self._pending: dict[Tensor, Tensor] = {}  # F of a pass, by parameter, until update_fisher takes it

    # ---- the interface ---------------------------------------------------------------------------------------------

    def init_wpl_weights(self, force: bool = False) -> None:
        """Anchor all monitored modules where they are, with F = 0.

        Args:
            force: also those of children that are WPLModules and were initialised already.
        """
        for key, module in self._monitored():
            if isinstance(module, WPLModule):
                if force or not module.build:
                    module.init_wpl_weights(force)
            else:
                self._modules_opt.pop(key, None)
                self._fisher.pop(key, None)
                self._follow(key, module)
        self.build = True

    def set_fisher_zero(self) -> None:
        """Forget F of all monitored modules."""
        for place in self._places(None):
            place.fisher.zero_()

    def update_optimal_weights(self) -> None:
        """Anchor all monitored modules where they are; F stays."""
        places = self._places(None)
        if places:
            with torch.no_grad():
                torch._foreach_copy_([place.theta_hat for place in places], [place.parameter for place in places])

    @contextmanager
    def fisher_pass(self, keys: Iterable[str] | None = None, **options: Any) -> Iterator[FisherAccumulator]:
        """Take per-sample gradients for the next :meth:`update_fisher`, in eval mode.

        Args:
            keys: of the modules that take part; default: all.
            options: of :class:`wplfast.FisherAccumulator`: ``verify``, ``independent``, ...

        Yields:
            The accumulator: call its ``backward(losses)`` with one loss per sample [N], once or for several batches.

        Raises:
            NameMismatchError: if a key is unknown.
            CoupledSamplesError: if a sample's loss depends on other samples.
        """
        places = {place.name: place for place in self._places(keys)}
        parameters = {name: place.parameter for name, place in places.items()}
        device = device_of(self.parameters())
        with Undisturbed(self, False, device), FisherAccumulator(self, parameters, **options) as accumulator:
            yield accumulator
            fisher = accumulator.finish()
        for module in self.modules():
            if isinstance(module, WPLModule):
                module._pending.clear()
        for name, place in places.items():
            place.owner._pending[place.parameter] = fisher[name]

    def update_fisher(self, keys: Iterable[str], epoch: int = 0) -> int:
        """Let F of some modules take in what :meth:`fisher_pass` found: ``F <- (1 - lambda) F + lambda F_new``.

        Args:
            keys: of the modules.
            epoch: for ``compat``, whose alpha decays.

        Returns:
            The number of parameters.

        Raises:
            WplfastError: if no pass saw a parameter since the last update.
            NameMismatchError: if a key is unknown.
        """
        places = self._places(keys)
        lacking = [place.name for place in places if place.parameter not in place.owner._pending]
        if lacking and not self.compat:
            raise WplfastError(
                f"there are no per-sample gradients of {some(lacking)}: .grad of a batch holds none. Run the batch in "
                "`with module.fisher_pass(keys) as batch: batch.backward(losses)`, with one loss per sample; "
                "WPLModule(args, compat=True) squares .grad, as the code of arXiv:1902.08232 does"
            )
        with torch.no_grad():
            for place in places:
                if self.compat:
                    place.take_(self._batch_square(place), self.args, self._decayed_alpha(epoch))
                else:
                    place.take_(place.owner._pending.pop(place.parameter), self.args, 1.0)
        return len(places)

    def compute_weight_plastic_loss_with_update_fisher(self, keys: Iterable[str]) -> Tensor:
        """Return ``alpha sum_i F_i (theta_i - theta_hat_i)^2`` of some modules; F is not updated, despite the name.

        Raises:
            NameMismatchError: if a key is unknown.
        """
        places = self._places(keys)
        if not places:
            return torch.zeros((), device=device_of(self.parameters()))
        alpha = 1.0 if self.compat else float(self.args.alpha_fisher)
        theta, theta_hat = [place.parameter for place in places], [place.theta_hat for place in places]
        return wpl_penalty(theta, theta_hat, [place.fisher for place in places], 2 * alpha)

    # ---- where things are ------------------------------------------------------------------------------------------

    def _monitored(self) -> list[tuple[str, nn.Module]]:
        """Return the modules that are anchored, by key."""
        pairs = self.wpl_monitored_modules.items()
        return [(key, module) for key, module in pairs if module is not None and key not in self.ignore_module_keys]

    def _places(self, keys: Iterable[str] | None, prefix: str = "") -> list[_Place]:
        """Return the parameters of some keys (None: all) with their anchors and F, each parameter once.

        Raises:
            TypeError: if keys is a string.
            NameMismatchError: if a key is unknown.
        """
        if isinstance(keys, str):
            raise TypeError(f"keys must be several keys, got the string {keys!r}: pass [{keys!r}]")
        monitored = dict(self._monitored())
        wanted = list(monitored if keys is None else (key for key in keys if key not in self.ignore_module_keys))
        unknown = [key for key in wanted if key not in monitored]
        if unknown:
            raise NameMismatchError(f"no module has the keys {some(unknown)}; there are {some(list(monitored))}")
        places: dict[int, _Place] = {}
        for key in wanted:
            module = monitored[key]
            if isinstance(module, WPLModule):
                found = module._places(None, f"{prefix}{key}/")
            else:
                self._follow(key, module)
                found = [
                    _Place(self, f"{prefix}{key}.{i}", p, self._modules_opt[key][str(i)], self._fisher[key][str(i)])
                    for i, p in enumerate(module.parameters())
                ]
            for place in found:
                places.setdefault(id(place.parameter), place)
        return list(places.values())

    def _follow(self, key: str, module: nn.Module) -> None:
        """Make a module's anchors and F where there are none, and move them to where its parameters are."""
        anchors, fishers = self._modules_opt.setdefault(key, {}), self._fisher.setdefault(key, {})
        for i, p in enumerate(map(Tensor.detach, module.parameters())):
            index, wide = str(i), flat_dtype(p.dtype)
            if index not in anchors:
                anchors[index], fishers[index] = p.clone(), torch.zeros_like(p, dtype=wide)
            elif anchors[index].shape != p.shape:
                raise NameMismatchError(
                    f"parameter {index} of {key!r} has shape {list(p.shape)}, its anchor {list(anchors[index].shape)}: "
                    "call init_wpl_weights after modules were replaced"
                )
            anchors[index], fishers[index] = anchors[index].to(p), fishers[index].to(p.device, wide)

    def _apply(self, fn: Any, recurse: bool = True) -> WPLModule:
        """Take anchors and F along: anchors in the parameters' dtype, F in its own."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for key, module in self._monitored():
            if key in self._fisher and not isinstance(module, WPLModule):
                self._follow(key, module)
        return self

    # ---- what that code computes -----------------------------------------------------------------------------------

    def _batch_square(self, place: _Place) -> Tensor | None:
        """Return the squared gradient of the last backward."""
        return None if place.parameter.grad is None else place.parameter.grad.to(place.fisher.dtype).square()

    def _decayed_alpha(self, epoch: int) -> float:
        """Return alpha of an epoch."""
        late = max(0.0, epoch - self.args.alpha_decay_after + 1)
        return max(0.0, float(self.args.alpha_fisher - late * self.args.alpha_decay))

    # ---- state -----------------------------------------------------------------------------------------------------

    def _state(self, prefix: str) -> dict[str, tuple[dict[str, Tensor], str]]:
        """Return where each entry of a state_dict lies."""
        columns = {"fisher": self._fisher, "theta_hat": self._modules_opt}
        return {
            f"{prefix}wpl.{what}.{key}.{index}": (held[key], index)
            for what, held in columns.items()
            for key in held
            for index in held[key]
        }

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add anchors and F."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({name: held[index] for name, (held, index) in self._state(prefix).items()})

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
        """Take anchors and F over, if there are any."""
        args = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(*args)
        given = [name for name in state_dict if name.startswith(f"{prefix}wpl.")]
        if not given:
            return
        for key, module in self._monitored():
            if not isinstance(module, WPLModule):
                self._follow(key, module)
        places = self._state(prefix)
        missing_keys += [name for name in places if name not in state_dict]
        unexpected_keys[:] = [name for name in unexpected_keys if name not in places]
        for name in places.keys() & set(given):
            held, index = places[name]
            if state_dict[name].shape != held[index].shape:
                found, expected = list(state_dict[name].shape), list(held[index].shape)
                error_msgs.append(f"{name} must have shape {expected}, got {found}")
            else:
                held[index].copy_(state_dict[name])


class _Place(NamedTuple):
    """A parameter, and what its module keeps of it."""

    owner: WPLModule
    name: str
    parameter: Tensor
    theta_hat: Tensor
    fisher: Tensor

    def take_(self, newest: Tensor | None, args: Any, alpha: float) -> None:
        """Let F take in a new one (None: forget it), limit its norm, and multiply it."""
        fisher = self.fisher
        if newest is None:
            fisher.zero_()
            return
        if args.momentum:
            fisher.mul_(1 - args.lambda_fisher)
        fisher.add_(newest, alpha=args.lambda_fisher)
        if args.fisher_clip_by_norm > 0:
            fisher.mul_((args.fisher_clip_by_norm / fisher.norm()).clamp_max(1.0))
        fisher.mul_(alpha)
