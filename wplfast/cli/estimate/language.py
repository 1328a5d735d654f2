"""Language models: causal, masked, and those with an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import losses
from .tasks import IGNORED, Example, Task, chosen, padded, text_of

_TEXT = ("text", "content", "sentence", "document")


class _TextAlone(Task):
    """A task whose records are texts."""

    def columns(self, given: Sequence[str]) -> Sequence[str]:
        """Choose the text."""
        if self.options.label is not None:
            raise ValueError(f"--label-field: a {self.name} model takes no labels but its text")
        return self.text_columns(given, _TEXT)

    def check(self, values: tuple[Any, ...]) -> Any:
        """Require a text."""
        return text_of(values[0])


class CausalLM(_TextAlone):
    """Each token is predicted from those before it."""

    name = "causal language"

    def encode(self, records: Sequence[tuple[int, Any]]) -> list[Example]:
        """Take the tokens for labels; a text of one token has no loss."""
        examples = self.tokenized([text for _, text in records])
        for example in examples:
            example.label = example.inputs["input_ids"]
            example.counts = example.length > 1
        return examples

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad inputs and labels."""
        return self.padded_inputs(examples), padded([e.label for e in examples], IGNORED)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the next tokens."""
        return losses.cross_entropy(outputs, targets, token_reduction=self.options.token_reduction, shift=True)


class MaskedLM(_TextAlone):
    """Masked tokens are predicted from the others: 15 % of them, as BERT was trained (arXiv:1810.04805).

    Of these 80 % become the mask token, 10 % a random one, 10 % stay. A sample's masks depend on the seed and its place
    in the file alone.
    """

    name = "masked language"

    def __init__(self, *arguments: Any) -> None:
        """Require a mask token.

        Raises:
            ValueError: if there is none.
        """
        super().__init__(*arguments)
        if self.tokenizer.mask_token_id is None:
            raise ValueError("the tokenizer of a masked language model must have a mask token")

    def encode(self, records: Sequence[tuple[int, Any]]) -> list[Example]:
        """Mask tokens."""
        examples = self.tokenized([text for _, text in records], return_special_tokens_mask=True)
        for (index, _), example in zip(records, examples, strict=True):
            special = torch.tensor(example.inputs.pop("special_tokens_mask"), dtype=torch.bool)
            ids = torch.tensor(example.inputs["input_ids"])
            generator = torch.Generator().manual_seed((self.options.seed << 32) + index)
            draw, kind = torch.rand(2, len(ids), generator=generator)
            masked = (draw < 0.15) & ~special
            random = torch.randint(len(self.tokenizer), ids.shape, generator=generator)
            example.label = ids.masked_fill(~masked, IGNORED).tolist()
            ids = ids.masked_fill(masked & (kind < 0.8), self.tokenizer.mask_token_id)
            example.inputs["input_ids"] = torch.where(masked & (kind >= 0.9), random, ids).tolist()
            example.counts = bool(masked.any())
        return examples

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad inputs and labels."""
        return self.padded_inputs(examples), padded([e.label for e in examples], IGNORED)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the masked tokens."""
        return losses.cross_entropy(outputs, targets, token_reduction=self.options.token_reduction)


class Seq2Seq(Task):
    """A target text is predicted from a source text."""

    name = "sequence-to-sequence"

    def columns(self, given: Sequence[str]) -> Sequence[str]:
        """Choose source and target."""
        source = self.text_columns(given, (*_TEXT, "source", "input", "article", "question"))
        usual = ("target", "summary", "output", "response", "answer", "translation")
        return (*source, chosen(given, self.options.label, usual, "the target", "--label-field"))

    def check(self, values: tuple[Any, ...]) -> Any:
        """Require two texts."""
        return text_of(values[0]), text_of(values[1], "the target")

    def encode(self, records: Sequence[tuple[int, Any]]) -> list[Example]:
        """Tokenize both; a target without tokens has no loss."""
        examples = self.tokenized([source for _, (source, _) in records])
        targets = self.tokenized(text_target=[target for _, (_, target) in records])
        for example, target in zip(examples, targets, strict=True):
            example.label = target.inputs["input_ids"]
            example.counts = bool(example.label)
            example.truncated |= target.truncated
        return examples

    def collate(self, examples: Sequence[Example]) -> tuple[dict[str, Tensor], Tensor]:
        """Pad; the decoder's inputs are the labels, one to the right."""
        inputs, labels = self.padded_inputs(examples), padded([e.label for e in examples], IGNORED)
        inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(labels=labels)
        return inputs, labels

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Return the cross-entropy of the target's tokens."""
        return losses.seq2seq(outputs, targets, token_reduction=self.options.token_reduction)
