"""What a Hugging Face model was made for: which columns it takes, how records become batches, and its loss."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ...integrations import _model_kinds
from .records import Records

#: Labels that do not count.
IGNORED = -100


@dataclass
class Options:
    """What the command line says about data.

    Attributes:
        text: columns of the text, one or two; None for the usual names.
        label: column of the label or target; None for the usual names.
        max_length: most tokens of a sample; None for the most that the model takes.
        token_reduction: how the tokens of a sample are combined.
        seed: of what is drawn, such as masks.
    """

    text: tuple[str, ...] | None
    label: str | None
    max_length: int | None
    token_reduction: Literal["sum", "mean"]
    seed: int


@dataclass
class Example:
    """A sample as tokens.

    Attributes:
        inputs: name -> a list of integers, one a token.
        label: a class, numbers, or one integer a token.
        counts: whether it has a loss.
        truncated: whether it was cut.
        words: which word each token belongs to, where the tokenizer knows.
    """

    inputs: dict[str, list[int]]
    label: Any
    counts: bool = True
    truncated: bool = False
    words: Sequence[int | None] = ()

    @property
    def length(self) -> int:
        """Number of tokens."""
        return len(self.inputs["input_ids"])


class Task(ABC):
    """A kind of model.

    Args:
        model: the Hugging Face model.
        tokenizer: its tokenizer.
        options: what the command line says.

    Attributes:
        likelihood: of its loss.
    """

    name: ClassVar[str]
    likelihood: str = "categorical"

    def __init__(self, model: Any, tokenizer: Any, options: Options) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.pad_id = next(
            (i for i in (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0
        )
        self.max_length = _max_length(model, tokenizer, options.max_length)
        self._n_embeddings = getattr(model.get_input_embeddings(), "num_embeddings", None)

    @abstractmethod
    def columns(self, given: Sequence[str]) -> Sequence[str]:
        """Choose the columns that it needs.

        Raises:
            ValueError: if they are not there.
        """

    @abstractmethod
    def check(self, values: tuple[Any, ...]) -> Any:
        """Return a record as it is encoded.

        Raises:
            ValueError: if its values cannot be.
        """

    @abstractmethod
    def encode(self, records: Sequence[tuple[int, Any]]) -> list[Example]:
        """Turn checked records into tokens."""

    @abstractmethod
    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Return inputs and targets of a batch."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return one loss per sample."""

    def checked(self, records: Records) -> list[Any]:
        """Check all records before the model runs.

        Raises:
            ValueError: with the line, if one is wrong.
        """
        found = []
        for place, values in zip(records.places, records.rows, strict=True):
            try:
                found.append(self.check(values))
            except ValueError as error:
                raise ValueError(f"{records.path}, {place}: {error}") from error
        return found

    def tokenized(self, *texts: Any, **options: Any) -> list[Example]:
        """Tokenize texts, or pairs of them, without labels.

        Raises:
            ValueError: if the model has no embedding for a token.
        """
        encoded = self.tokenizer(*texts, truncation=True, max_length=self.max_length, verbose=False, **options)
        found = []
        for i, ids in enumerate(encoded["input_ids"]):
            if ids and self._n_embeddings is not None and max(ids) >= self._n_embeddings:
                raise ValueError(
                    f"the tokenizer has the token {max(ids)}, the model {self._n_embeddings:,} embeddings: it is "
                    "another model's tokenizer"
                )
            example = Example({key: list(values[i]) for key, values in encoded.items()}, None)
            if encoded.encodings:
                example.truncated = bool(encoded.encodings[i].overflowing)
                example.words = encoded.encodings[i].word_ids
            else:
                example.truncated = len(ids) >= self.max_length
            found.append(example)
        return found

    def padded_inputs(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Pad inputs on the right, where the attention mask is 0."""
        fill = {"input_ids": self.pad_id, "token_type_ids": self.tokenizer.pad_token_type_id}
        return {key: padded([e.inputs[key] for e in examples], fill.get(key, 0)) for key in examples[0].inputs}

    def text_columns(self, given: Sequence[str], usual: Sequence[str], most: int = 1) -> tuple[str, ...]:
        """Choose the columns of the text.

        Raises:
            ValueError: if there are none, or more than so many were asked for.
        """
        asked = self.options.text
        if asked is None:
            return (chosen(given, None, usual, "the text", "--text-field"),)
        if len(asked) > most:
            raise ValueError(f"--text-field: a {self.name} model takes {most} of them, got {', '.join(asked)}")
        return tuple(chosen(given, name, (), "the text", "--text-field") for name in asked)


def chosen(given: Sequence[str], asked: str | None, usual: Sequence[str], what: str, option: str) -> str:
    """Choose a column: the one that was asked for, or the first of the usual names.

    Raises:
        ValueError: with the columns that there are, if it is not among them.
    """
    if asked is not None:
        if asked not in given:
            raise ValueError(f"there is no column {asked!r} ({option}), only {_list(given)}")
        return asked
    for name in usual:
        if name in given:
            return name
    raise ValueError(
        f"no column for {what} is called {' or '.join(map(repr, usual))}: name one of {_list(given)} with {option}"
    )


def _list(names: Sequence[str]) -> str:
    """List columns for a message."""
    return f"[{', '.join(map(repr, names[:20]))}{', ...' if len(names) > 20 else ''}]"


def text_of(value: Any, column: str = "the text") -> str:
    """Require a text.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{column} must be a text, got {value!r:.60}")
    return value


def padded(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    """Return rows of integers as [N, T], int64, filled up on the right."""
    found = torch.full((len(rows), max(map(len, rows))), fill)
    for i, row in enumerate(rows):
        found[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return found


def _max_length(model: Any, tokenizer: Any, asked: int | None) -> int:
    """Return the most tokens of a sample: what was asked for, or else what model and tokenizer take.

    Raises:
        ValueError: if the model takes fewer than were asked for.
    """
    config = model.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if asked is not None and positions is not None and asked > positions:
        raise ValueError(f"--max-length {asked}: the model has {positions} positions")
    if asked is not None:
        return asked
    limits = [n for n in (positions, tokenizer.model_max_length) if n is not None and n < 1 << 24]
    return min(limits, default=512)


class Kind(NamedTuple):
    """A kind of model that commands know.

    Attributes:
        loader: the class of transformers that loads it.
        module: of its task here.
        task: name of that class.
    """

    loader: str
    module: str
    task: str


_KINDS = {
    "causal": Kind("AutoModelForCausalLM", "language", "CausalLM"),
    "masked": Kind("AutoModelForMaskedLM", "language", "MaskedLM"),
    "seq2seq": Kind("AutoModelForSeq2SeqLM", "language", "Seq2Seq"),
    "texts": Kind("AutoModelForSequenceClassification", "classification", "SequenceClassification"),
    "tokens": Kind("AutoModelForTokenClassification", "classification", "TokenClassification"),
}


def kind_of(architecture: str | type) -> Kind:
    """Return the kind of an architecture, by its name or class.

    Raises:
        ValueError: if it has no task that is known here.
        ImportError: if transformers is missing.
    """
    kind = _model_kinds.kind_of(architecture)
    if kind in _KINDS:
        return _KINDS[kind]
    name = architecture if isinstance(architecture, str) else architecture.__name__
    loaders = ", ".join(kind.loader for kind in _KINDS.values())
    raise ValueError(
        f"{name} is none of the architectures whose task is known (those of {loaders}): give a function that returns "
        "(model, data, loss) instead, --model module:function"
    )


def task_of(model: Any, tokenizer: Any, options: Options) -> Task:
    """Return the task of a model, by its class; of an adapter's, by that of the model under it.

    Raises:
        ValueError: if it is of no kind that is known here.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = kind_of(type(inner))
    module = importlib.import_module(f".{kind.module}", __package__)
    task: type[Task] = getattr(module, kind.task)
    return task(model, tokenizer, options)
