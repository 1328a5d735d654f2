"""What is changed for a while, and comes back whatever happens: an error, Ctrl-C, and Ctrl-C again while it comes back.

Signals, like exceptions from other threads and from trace functions, are raised between two instructions of Python:
between two lines of a ``finally`` clause, before the first line of an ``__exit__``; an ``ExitStack`` then loses what it
was about to do. So nothing is given back by Python here. The calls lie ready as iterators of C (``map`` over functions
of C), the ``__exit__`` is that of ``io.IOBase``, which is C and calls ``close``, and ``close`` runs through all of the
calls: no handler, trace function or other thread comes between.
"""

from __future__ import annotations

import io
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any, Generic, TypeVar, cast

import torch

T = TypeVar("T")


class Undo(io.IOBase):
    """A context that calls what was given to :meth:`by` when it ends, or when nobody refers to it any more; once.

    Say what gives a change back before you make it. Subclasses make theirs in :meth:`change`, others in the body of a
    ``with`` statement, or where an :class:`UndoOnExit` is the ``__exit__``.
    """

    close: Callable[[], None]

    def __init__(self, is_inner: bool = False) -> None:
        """Nothing to give back yet.

        An inner one, within another, may be closed late, when an interrupt's traceback lets go of it. How this thread
        calls torch functions is then left as it is by then.
        """
        self._is_inner = is_inner
        self._steps: list[Iterator[object]] = []
        self._then: list[Iterator[object]] = []
        calls = chain.from_iterable([chain.from_iterable(self._steps), chain.from_iterable(self._then)])
        forget = map(list.clear, [self._steps, self._then])  # with all that the calls refer to
        self.close = cast(Any, partial(deque, chain(calls, forget), 0))

    def by(self, function: Callable[..., object], *columns: Iterable[Any]) -> None:
        """Call a function once for each row of the columns, in the end. It must be of C and not run any Python."""
        if not (self._steps or self._is_inner):
            self._remember_torch_functions()
        self._steps.append(map(function, *columns))

    def _remember_torch_functions(self) -> None:
        """Let this thread ask subclasses and modes about torch functions in the end as now, and not before that."""
        before, guard = torch._C.DisableTorchFunction(), torch._C.DisableTorchFunction()
        enter, leave = (
            map(type(before).__enter__, [before]),
            map(type(before).__exit__, [before], [None], [None], [None]),
        )
        deque(chain(enter, leave), 0)  # it remembers what was; in one call, or an interrupt would leave it entered
        if torch._C._len_torch_function_stack():  # a default device: setters would call its mode, which is of Python
            self._steps.append(map(type(guard).__enter__, [guard]))
        self._then.append(map(type(before).__exit__, [before], [None], [None], [None]))

    def then(self, function: Callable[[], object]) -> None:
        """Call a function after all that, which may be of Python: an interrupt may keep it from being called."""
        self._then.append(map(partial.__call__, [partial(function)]))

    def change(self) -> None:
        """Change what the context gives back."""

    def __enter__(self) -> Undo:
        """Make the changes."""
        try:
            self.change()
            return self
        except BaseException:
            self.close()
            raise


class UndoOnExit:
    """The ``__exit__`` of a class whose instances have an :class:`Undo` as ``_undo``: that one's, of C, itself."""

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """Return the method; the class's own, for ``ExitStack``, takes an instance."""
        return self if instance is None else instance._undo.__exit__

    def __call__(self, instance: Any, *error: object) -> None:
        """Give back what an instance changed."""
        instance._undo.close()


class Shared(Generic[T]):
    """A setting of the whole process that contexts in any thread change at once: the last one that ends gives it back.

    Args:
        get: returns the setting.
        set_: sets it; of C.
        during: what it is while there are such contexts.
    """

    def __init__(self, get: Callable[[], T], set_: Callable[[T], object], during: T) -> None:
        self._get, self._set = get, set_
        self._values = [during, during]  # while there are holders, and without
        self._holders: set[object] = set()
        self._lock = threading.Lock()

    def hold(self, undo: Undo) -> None:
        """Change it until ``undo`` is closed."""
        holder = object()
        with self._lock:
            if not self._holders:
                self._values[1] = self._get()
            undo.by(self._holders.discard, [holder])
            undo.by(self._set, map(operator.getitem, [self._values], map(operator.not_, [self._holders])))
            self._holders.add(holder)
            self._set(self._values[0])
