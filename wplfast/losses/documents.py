"""Documents packed into rows, as samples: their numbers, from positions or from whatever names them."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_ids(position_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Number the documents that are packed into rows, by positions that restart: for ``losses.cross_entropy``.

    A document begins with a row, after padding, at position 0, and where positions fall.

    Args:
        position_ids: positions in the document, integers [N, T] or [T].
        attention_mask: zero (or False) at padding, [N, T] or [T]. Without it, zeros that pad positions would count as
            documents of one token.

    Returns:
        int64, of the shape that both have together: numbers from 0 on over the whole batch; -1 at padding.

    Raises:
        TypeError: if one of them does not hold integers.
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch, wplfast
        >>> wplfast.losses.sample_ids(torch.tensor([[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]))
        tensor([[0, 0, 0, 1, 1],
                [2, 2, 3, 3, 3]])
    """
    mask = torch.ones_like(position_ids) if attention_mask is None else attention_mask
    check_integers("position_ids", position_ids)
    check_integers("attention_mask", mask)
    rows = {len(t) for t in (position_ids, mask) if t.dim() == 2} - {1}
    dims = {position_ids.dim(), mask.dim()}
    if not dims <= {1, 2} or len(rows) > 1 or position_ids.shape[-1] != mask.shape[-1]:
        got = f"{list(position_ids.shape)} and {list(mask.shape)}"
        raise ValueError(f"position_ids and attention_mask must be [N, T] or [T], got {got}")
    positions, real = torch.broadcast_tensors(position_ids.long(), mask.to(position_ids.device) != 0)
    begins = real.clone()
    begins[..., 1:] &= (positions[..., 1:] == 0) | (positions.diff() < 0) | ~real[..., :-1]
    return torch.where(real, begins.reshape(-1).cumsum(0).view(real.shape) - 1, -1)


def numbered(ids: Tensor, shape: torch.Size) -> tuple[Tensor, int]:
    """Number documents from 0 on in the order in which they begin.

    Args:
        ids: integers that name the document of each token, negative ones padding: of ``shape``, or of one row that all
            rows are like, each with documents of its own.
        shape: of the tokens, [..., T].

    Returns:
        The documents' numbers, of ``shape``, and how many documents there are, M; padding has the number M.

    Raises:
        TypeError: if ids does not hold integers.
        ValueError: if it does not fit, or a document lies in several rows.
    """
    check_integers("sample_ids", ids)
    length = shape[-1]
    if ids.shape not in (shape, (1, length), (length,)):
        raise ValueError(
            f"sample_ids must have the targets' shape, {list(shape)}, or [1, {length}], got {list(ids.shape)}"
        )
    n_tokens = shape.numel()
    if not n_tokens:
        return torch.zeros(shape, dtype=torch.int64, device=ids.device), 0
    ids = ids.long().clamp_min(-1)
    if ids.shape != shape:
        rows = torch.arange(n_tokens // length, device=ids.device).view(*shape[:-1], 1)
        ids = torch.where(ids < 0, ids, ids + rows * (ids.amax() + 1))
    names, number = ids.reshape(-1).unique(return_inverse=True)
    place = torch.arange(n_tokens, device=ids.device)
    first = torch.zeros_like(names).scatter_reduce(0, number, place, "amin", include_self=False)
    last = torch.zeros_like(names).scatter_reduce(0, number, place, "amax", include_self=False)
    several = names[(names >= 0) & (first // length != last // length)]
    if len(several):
        raise ValueError(
            f"sample_ids have {int(several[0])} in several rows: number the documents over the whole batch, as "
            "losses.sample_ids does; where a sample does own several rows, sum over its rows in the loss, "
            "torch.zeros(n_samples).index_add(0, sample_of_row, loss_of_row)"
        )
    order = first.masked_fill(names < 0, n_tokens).argsort()  # padding last
    return order.argsort()[number].view(shape), int((names >= 0).sum())


def sums(of_tokens: Tensor, number: Tensor, n_documents: int) -> Tensor:
    """Sum over the tokens of each document, in float32 or wider, and leave out padding; return [M]."""
    wide = of_tokens.reshape(-1).to(torch.promote_types(of_tokens.dtype, torch.float32))
    return wide.new_zeros(n_documents + 1).index_add(0, number.reshape(-1), wide)[:-1]


def check_integers(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of floating point numbers.

    Raises:
        TypeError: naming it.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold integers, got {str(tensor.dtype).removeprefix('torch.')}")
