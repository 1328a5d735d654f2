"""RNNs seen through: ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and their cells as linear calls, which are intercepted.

The fused functions behind these modules take all weights in one call. Here each layer and direction is an
``F.linear`` of all inputs, another of all hidden states, and the recurrence between them (:mod:`.recurrent_scan`),
which holds no parameters. The hidden states are not known before the recurrence has run, so that it computes their
product with W_hh itself, step by step, and the call that this amounts to is tapped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..watched import Derived, is_watched, map_tensors
from .recurrent_cells import Gru, Lstm, Rnn
from .recurrent_scan import Cell, Scan, Steps, Weights


class Tapping(Protocol):
    """What intercepts."""

    reorders: bool
    native_dtypes: set[torch.dtype]

    def tap_result(self, func: Callable[..., Any], args: tuple[Any, ...], like: Tensor, moves: bool) -> Tensor | None:
        """Tap a call that ran as a part of something else."""


_CELLS: dict[Any, Cell] = {
    torch.lstm: Lstm(),
    torch.gru: Gru(),
    torch.rnn_tanh: Rnn("tanh"),
    torch.rnn_relu: Rnn("relu"),
}


def run_as_linear_calls(
    tapping: Tapping, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run one of the fused functions, or a cell, by way of linear calls.

    Returns:
        What the function returns; NotImplemented to leave the call as it is.
    """
    cell = _CELLS.get(func)
    if cell is None:
        return _STEPS[func](*args, **kwargs) if func in _STEPS else NotImplemented
    packed = len(args) > 3 and isinstance(args[3], (tuple, list))
    tapping.reorders |= packed  # rows lie by length, and how many samples have a step depends on the data
    if kwargs or len(args) != 9:
        return NotImplemented
    if not torch.is_autocast_enabled(args[0].device.type):
        return _Layers(tapping, cell, args, packed).run()
    with torch.autocast(args[0].device.type, enabled=False):
        result = _Layers(tapping, cell, map_tensors(_widened, args), packed).run()
    if result is NotImplemented:
        return result
    tapping.native_dtypes.add(torch.get_autocast_dtype(args[0].device.type))
    return tuple(t.to(dtype) for t, dtype in zip(result, _native_dtypes(func, args, packed), strict=True))


def _widened(tensor: Tensor) -> Tensor:
    """Return data of half precision in float32, in which the steps run where autocast would choose for a kernel."""
    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return tensor.float() if half and not _is_seen(tensor) else tensor


def _native_dtypes(func: Callable[..., Any], args: tuple[Any, ...], packed: bool) -> list[torch.dtype]:
    """Return the dtypes of what the function itself returns, from a call on a step or two."""
    with torch._C.DisableTorchFunctionSubclass():
        if packed:
            data, sizes, hx, *rest = args
            n = 2 if sizes[0] != sizes[-1] else 1  # lengths that differ are another kernel's
            data = data[:1] if n == 1 else torch.cat([data[:2], data[:1]])
            first: list[Any] = [data, sizes.new_tensor([2, 1][2 - n :]), [h[:, :n].contiguous() for h in _states(hx)]]
        else:
            data, hx, *rest = args
            first = [data[:1, :1], [h[:, :1].contiguous() for h in _states(hx)]]
        if isinstance(hx, Tensor):
            first[-1] = first[-1][0]
        return [t.dtype for t in func(*first, *rest)]


def _states(hx: Any) -> list[Tensor]:
    """List the initial states, of which there are one or two."""
    return [hx] if isinstance(hx, Tensor) else list(hx)


class _Layers:
    """One call of a fused function."""

    def __init__(self, tapping: Tapping, cell: Cell, args: tuple[Any, ...], packed: bool) -> None:
        """Sort the arguments of either overload."""
        self.tapping, self.cell = tapping, cell
        if packed:
            self.data, sizes, hx, params, biases, self.n_layers, self.dropout, self.train, both = args
            self.sizes, self.batch_first = sizes.tolist(), False
        else:
            self.data, hx, params, biases, self.n_layers, self.dropout, self.train, both, self.batch_first = args
            self.sizes = []
        self.packed, self.directions = packed, 2 if both else 1
        self.hx = _states(hx)
        self.params: list[Tensor] = list(params)
        self.weights = self._weights(params, biases)

    def _weights(self, params: Sequence[Tensor], biases: bool) -> list[Weights]:
        """Group the weights by layer and direction."""
        projects = len(self.hx) == 2 and self.hx[0].shape[-1] != self.hx[1].shape[-1]
        names = ["ih", "hh", *(["b_ih", "b_hh"] if biases else []), *(["hr"] if projects else [])]
        firsts = range(0, len(params), len(names))
        groups = [params[first : first + len(names)] for first in firsts]
        return [Weights(**dict(zip(names, group, strict=False))) for group in groups if len(group) == len(names)]

    def _is_plain(self) -> bool:
        """Tell whether this is a call to see through, and well formed: if not, PyTorch knows what to say."""
        seen = [_is_seen(t) for t in self.params]
        computed = any(t.requires_grad and not t.is_leaf for t, s in zip(self.params, seen, strict=True) if not s)
        return (
            any(seen)
            and not computed
            and not _is_seen(self.data)
            and self.data.dim() == (2 if self.packed else 3)
            and self.data.numel() > 0
            and len(self.hx) == self.cell.n_states
            and len(self.weights) == self.n_layers * self.directions == len(self.hx[0])
            and all(t.dtype == self.data.dtype for t in (*self.hx, *self.params))
        )

    def run(self) -> Any:
        """Run all layers; NotImplemented if the call is not one to see through."""
        if not self._is_plain():
            return NotImplemented
        x = self.data.transpose(0, 1).contiguous() if self.batch_first else self.data
        sizes = self.sizes or [x.shape[1]] * len(x)
        # an initial state that is a parameter is added to zeros, which have a sample axis
        initial = [h if not _is_seen(h) else self.data.new_zeros(h.shape) + h for h in self.hx]
        states = [h.unbind(0) for h in initial]
        moves = self.data.requires_grad or any(h.requires_grad for h in initial)
        finals: list[tuple[Tensor, ...]] = []
        for layer in range(self.n_layers):
            outputs = []
            for direction in range(self.directions):
                index = layer * self.directions + direction
                begin, steps = [state[index] for state in states], Steps(sizes, reverse=direction == 1)
                found = self._direction(x, begin, self.weights[index], steps, moves)
                if found is None:
                    return NotImplemented
                outputs.append(found[0])
                finals.append(found[1:])
            x, moves = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1), True
            if self.train and self.dropout and layer < self.n_layers - 1:
                x = F.dropout(x, self.dropout, True)
        output = x.transpose(0, 1) if self.batch_first else x
        return (output, *(torch.stack(state) for state in zip(*finals, strict=True)))

    def _direction(
        self, x: Tensor, states: list[Tensor], weights: Weights, steps: Steps, moves: bool
    ) -> tuple[Tensor, ...] | None:
        """Run one layer in one direction; None if its projections turn out to depend on parameters alone."""
        with torch.no_grad():
            plain = weights.detached()
            begin = [state.detach() for state in states]
            run = self.cell.forward(x.detach().reshape(-1, x.shape[-1]), begin, plain, steps)

        def tap(inputs: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor, moves: bool) -> Tensor | None:
            lead = x.shape[:-1]
            args = (inputs if inputs is x else inputs.view(*lead, -1), weight, bias)
            return self.tapping.tap_result(F.linear, args, like.detach().view(*lead, -1), moves)

        given = tap(x, weights.ih, weights.b_ih, run.projections[0], x.requires_grad)
        hidden = tap(run.before, weights.hh, weights.b_hh, run.projections[1], moves)
        projected = None
        if run.unprojected is not None:
            projected = tap(run.unprojected, weights.hr, None, run.results[0], True)
        if given is None or hidden is None or (projected is None and run.unprojected is not None):
            return None
        tensors = (x, given, hidden, projected, *states)
        output, *final = Scan.apply(self.cell, steps, run, plain.ih, *tensors)  # type: ignore[no-untyped-call]
        return output.view(*x.shape[:-1], -1), *final


def _is_seen(tensor: Tensor) -> bool:
    """Tell whether a tensor is a parameter of a pass or derived from some."""
    return isinstance(tensor, Derived) or is_watched(tensor)


def _lstm_cell(
    x: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``torch.lstm_cell``."""
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(hx[0], w_hh, b_hh)).chunk(4, 1)
    c = torch.sigmoid(f) * hx[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """``torch.gru_cell``."""
    x_r, x_z, x_n = F.linear(x, w_ih, b_ih).chunk(3, 1)
    h_r, h_z, h_n = F.linear(hx, w_hh, b_hh).chunk(3, 1)
    n = torch.tanh(torch.addcmul(x_n, torch.sigmoid(x_r + h_r), h_n))
    return n + torch.sigmoid(x_z + h_z) * (hx - n)


def _rnn_cell(squash: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """``torch.rnn_tanh_cell`` and ``torch.rnn_relu_cell``."""

    def cell(
        x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Tensor:
        return squash(F.linear(x, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))

    return cell


_STEPS: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: _lstm_cell,
    torch.gru_cell: _gru_cell,
    torch.rnn_tanh_cell: _rnn_cell(torch.tanh),
    torch.rnn_relu_cell: _rnn_cell(torch.relu),
}

#: The functions that may be seen through.
SEEN = frozenset({*_CELLS, *_STEPS})
