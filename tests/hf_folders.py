"""Tiny Hugging Face models with a tokenizer, saved to disk: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = [f"w{i}" for i in range(30)]
SPECIAL = ["<pad>", "<eos>", "[CLS]", "[SEP]", "[MASK]", "<unk>"]
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
LABELS = {0: "no", 1: "maybe", 2: "yes"}


def tokenizer(brackets: bool = False) -> Any:
    """A tokenizer of whole words; ``brackets``: [CLS] and [SEP] around them, as for BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if brackets:
        pairs = [(name, VOCABULARY[name]) for name in ("[CLS]", "[SEP]")]
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=pairs
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", mask_token="[MASK]", unk_token="<unk>",
        cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip


def model(kind: str) -> Any:
    """A model of two layers and 8 dimensions."""
    import transformers

    torch.manual_seed(0)
    n = len(VOCABULARY)
    bert = {
        "vocab_size": n, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
        "max_position_embeddings": 24,
    }  # fmt: skip
    gpt2 = {
        "vocab_size": n,
        "n_positions": 16,
        "n_embd": 8,
        "n_layer": 2,
        "n_head": 2,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    if kind == "t5":
        sizes = {"d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(vocab_size=n, decoder_start_token_id=0, **sizes)
        return transformers.T5ForConditionalGeneration(config)
    if kind in ("gpt2", "gpt2 classes"):
        kinds = {"gpt2": transformers.GPT2LMHeadModel, "gpt2 classes": transformers.GPT2ForSequenceClassification}
        return kinds[kind](transformers.GPT2Config(**gpt2, **(labels if "classes" in kind else {})))
    kinds = {
        "masked": (transformers.BertForMaskedLM, {}),
        "classes": (transformers.BertForSequenceClassification, labels),
        "number": (transformers.BertForSequenceClassification, {"num_labels": 1}),
        "several": (
            transformers.BertForSequenceClassification,
            {**labels, "problem_type": "multi_label_classification"},
        ),
        "tags": (transformers.BertForTokenClassification, labels),
    }
    cls, more = kinds[kind]
    return cls(transformers.BertConfig(**bert, **more))


def saved(kind: str, folder: Path, with_tokenizer: bool = True) -> str:
    """Save a model and its tokenizer; return the folder."""
    path = folder / kind.replace(" ", "-")
    if not path.exists():
        model(kind).save_pretrained(path)
        if with_tokenizer:
            tokenizer(brackets=not kind.startswith(("gpt2", "t5"))).save_pretrained(path)
    return str(path)
