"""What torch functions are to a pass: about a parameter itself, copies, look-ups, or several steps in one call."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F

from .attention import scaled_dot_product_attention

#: Functions that read or set something about a parameter itself; they run natively on the parameter.
ABOUT_ITSELF = frozenset(
    """
    __delete__ __dir__ __format__ __hash__ __len__ __reduce_ex__ __repr__ __set__ __str__ _is_view apply_ backward
    data_ptr detach detach_ dim element_size empty_like full_like get_device is_complex is_conj is_contiguous
    is_floating_point is_inference is_neg is_pinned is_same_size is_set_to is_shared is_signed item ndimension nelement
    new_empty new_full new_ones new_tensor new_zeros numel numpy ones_like rand_like randn_like register_hook
    register_post_accumulate_grad_hook requires_grad_ retain_grad share_memory_ size storage storage_offset stride
    tolist untyped_storage zeros_like
    """.split()  # noqa: SIM905
)
#: Functions on parameters alone whose result has the parameter's gradient, summed over what was expanded.
EXPANSIONS = frozenset({"expand", "expand_as", "broadcast_to"})
COPIES = frozenset({"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"})
#: Functions that take only type or shape from their other arguments.
LIKE = frozenset({"to", "type_as", "expand_as", "view_as", "reshape_as"})
#: Functions whose indices may be the samples' own even where the model keeps them (token types, expanded).
LOOKUPS = frozenset({"embedding", "embedding_bag"})
#: Properties that are operations on the value.
VIEW_PROPERTIES = frozenset({"T", "H", "mT", "mH", "real", "imag"})


def with_inner_calls(func: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a composite Python function so that it runs instead of dispatching itself; its inner calls still dispatch.

    ``F.multi_head_attention_forward`` reaches ``__torch_function__`` as one call, which would hide its projections.
    """
    assert isinstance(func, types.FunctionType)
    scope = {**func.__globals__, "has_torch_function": lambda *_: False}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


#: Functions of several steps, as functions whose steps are intercepted one by one.
SEEN_THROUGH = {
    F.multi_head_attention_forward: with_inner_calls(F.multi_head_attention_forward),
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}


def is_the_same(func: Callable[..., Any], name: str) -> bool:
    """Tell whether a call about a tensor itself returns the tensor's values without a gradient."""
    return name == "detach" or (name == "__get__" and getattr(func.__self__, "__name__", "") == "data")  # type: ignore[attr-defined]


def is_about_itself(func: Callable[..., Any], name: str, n_arguments: int) -> bool:
    """Tell whether a call reads or sets something about a parameter, rather than computes with its value."""
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in VIEW_PROPERTIES
    return name in ABOUT_ITSELF or (name == "type" and n_arguments < 2)
