"""Models that classify texts or tokens, and those that tell a number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import losses
from .tasks import IGNORED, Example, Task, chosen, padded, text_of


class SequenceClassification(Task):
    """A text, or a pair of texts, has a class, several, or a number: as the model's configuration says."""

    name = "sequence classification"

    def __init__(self, *arguments: Any) -> None:
        """Find out which kind of label the model has, and give it a padding token that it looks for.

        Raises:
            ValueError: if the configuration says something else.
        """
        super().__init__(*arguments)
        config = self.model.config
        kinds = {
            "single_label_classification": ("categorical", losses.cross_entropy),
            "multi_label_classification": ("bernoulli", losses.bernoulli),
            "regression": ("gaussian", losses.mse),
        }
        usual = "regression" if config.num_labels == 1 else "single_label_classification"
        self._kind = config.problem_type or usual
        if self._kind not in kinds:
            raise ValueError(f"problem_type must be one of {', '.join(kinds)}, got {self._kind!r}")
        self.likelihood, self._loss = kinds[self._kind]
        self._classes = Classes(config)
        if config.pad_token_id is None:  # decoders look for the last token that is none
            config.pad_token_id = self.pad_id

    def columns(self, given: Sequence[str]) -> Sequence[str]:
        """Choose texts and label."""
        texts = self.text_columns(given, ("text", "sentence", "content", "document", "review"), most=2)
        usual = ("label", "labels", "class", "category", "score", "target")
        return (*texts, chosen(given, self.options.label, usual, "the label", "--label-field"))

    def check(self, values: tuple[Any, ...]) -> Any:
        """Require texts and a label of the model's."""
        texts = tuple(text_of(value) for value in values[:-1])
        return texts, self._label(values[-1])

    def _label(self, value: Any) -> Any:
        """Return a label as the loss takes it.

        Raises:
            ValueError: if it is none of the model's.
        """
        if self._kind == "single_label_classification":
            return self._classes.index(value)
        n = len(self._classes)
        if self._kind == "multi_label_classification":
            if not isinstance(value, list):
                raise ValueError(f"the label must be a list of {n} numbers or of names, got {value!r:.60}")
            if all(isinstance(part, str) for part in value):
                held = {self._classes.index(part) for part in value}
                return [float(i in held) for i in range(n)]
        numbers = value if isinstance(value, list) else [value]
        try:
            found = [float(number) for number in numbers]
        except (TypeError, ValueError):
            raise ValueError(f"the label must be a number, got {value!r:.60}") from None
        if len(found) != n:
            raise ValueError(f"the label must have {n} numbers, got {len(found)}")
        return found

    def encode(self, records: Sequence[tuple[int, Any]]) -> list[Example]:
        """Tokenize texts."""
        texts = [[texts[i] for _, (texts, _) in records] for i in range(len(records[0][1][0]))]
        examples = self.tokenized(*texts)
        for (_, (_, label)), example in zip(records, examples, strict=True):
            example.label = label
            example.counts = example.length > 0
        return examples

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad inputs."""
        return self.padded_inputs(examples), torch.tensor([example.label for example in examples])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the loss of the labels."""
        return self._loss(outputs, targets)  # type: ignore[no-any-return, operator]


class TokenClassification(Task):
    """Each word has a class; it counts at the word's first token, as Hugging Face's examples train it."""

    name = "token classification"

    def __init__(self, *arguments: Any) -> None:
        """Require a tokenizer that knows words.

        Raises:
            ValueError: if it does not.
        """
        super().__init__(*arguments)
        if not self.tokenizer.is_fast:
            raise ValueError("the tokenizer of a token classification model must be a fast one, which knows words")
        self._classes = Classes(self.model.config)

    def columns(self, given: Sequence[str]) -> Sequence[str]:
        """Choose words and their labels."""
        words = self.text_columns(given, ("tokens", "words"))
        usual = ("ner_tags", "tags", "labels", "pos_tags", "label")
        return (*words, chosen(given, self.options.label, usual, "the words' labels", "--label-field"))

    def check(self, values: tuple[Any, ...]) -> Any:
        """Require a list of words and a label for each."""
        words, labels = values
        if not (isinstance(words, list) and all(isinstance(word, str) for word in words)):
            raise ValueError(f"the text must be a list of words, got {words!r:.60}")
        if not isinstance(labels, list) or len(labels) != len(words):
            got = f"{len(labels)} labels" if isinstance(labels, list) else f"{labels!r:.60}"
            raise ValueError(f"there must be a label for each of the {len(words)} words, got {got}")
        return words, [self._classes.index(label) for label in labels]

    def encode(self, records: Sequence[tuple[int, Any]]) -> list[Example]:
        """Tokenize words."""
        examples = self.tokenized([words for _, (words, _) in records], is_split_into_words=True)
        for (_, (_, labels)), example in zip(records, examples, strict=True):
            before = [None, *example.words[:-1]]
            example.label = [
                labels[word] if word is not None and word != last else IGNORED
                for last, word in zip(before, example.words, strict=True)
            ]
            example.counts = any(label != IGNORED for label in example.label)
        return examples

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad inputs and labels."""
        return self.padded_inputs(examples), padded([e.label for e in examples], IGNORED)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the words' classes."""
        return losses.cross_entropy(outputs, targets, token_reduction=self.options.token_reduction)


class Classes:
    """The classes of a model, by number or name.

    Args:
        config: the model's.
    """

    def __init__(self, config: Any) -> None:
        self._count = config.num_labels
        self._names = {str(name): int(index) for name, index in (config.label2id or {}).items()}

    def __len__(self) -> int:
        return int(self._count)

    def index(self, value: Any) -> int:
        """Return the number of a class: numbers of them, as text too (CSV has no other), and names.

        Raises:
            ValueError: if the model has no such class.
        """
        if isinstance(value, str) and value in self._names:
            return self._names[value]
        is_number = isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("-").isdecimal())
        if not is_number:
            names = ", ".join(map(repr, sorted(self._names, key=self._names.__getitem__)[:12]))
            raise ValueError(f"the label must be one of the model's ({names}) or its number, got {value!r:.60}")
        if not 0 <= int(value) < self._count:
            raise ValueError(f"the label must be 0 to {self._count - 1}, as the model has them, got {value}")
        return int(value)
