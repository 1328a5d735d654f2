"""Hugging Face model folders: a configuration, weights and a tokenizer, on this machine's disk alone."""

from __future__ import annotations

import errno
import json
import os
from typing import Any

import torch

from .tasks import kind_of

#: What a folder with a tokenizer holds at least one of.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")


def load(path: str, dtype: str | None) -> tuple[Any, Any]:
    """Load a model and its tokenizer, None if the folder has none.

    Args:
        path: of the folder.
        dtype: of the weights, such as ``"float32"``; None: as they are stored.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it holds no model whose task is known, or the weights lack some of it.
        ImportError: if transformers is missing.
    """
    architecture = _architecture(path)
    transformers = _transformers()
    loader = getattr(transformers, kind_of(architecture).loader)
    kind = "auto" if dtype is None else getattr(torch, dtype)
    model, told = loader.from_pretrained(path, local_files_only=True, dtype=kind, output_loading_info=True)
    missing = sorted(told["missing_keys"])
    if missing:
        raise ValueError(
            f"{path}: the weights lack {len(missing)} of the model's parameters, {missing[0]!r} for one, which would "
            f"be random: is this the folder of a trained {architecture}?"
        )
    model.config.use_cache = False
    tokenizer = None
    if any(os.path.exists(os.path.join(path, name)) for name in _TOKENIZER):
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model, tokenizer


def shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a folder's parameters by name; no weights are read.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it holds no model whose task is known.
        ImportError: if transformers is missing.
    """
    architecture = _architecture(path)
    transformers = _transformers()
    loader = getattr(transformers, kind_of(architecture).loader)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        model = loader.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _architecture(path: str) -> str:
    """Return the name of the class that was saved.

    Raises:
        OSError: if there is no such folder.
        ValueError: if it holds no model.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(errno.ENOENT, "there is no such folder, and it is no module:function", path)
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "is a file; a model is a Hugging Face folder or module:function", path)
    config = os.path.join(path, "config.json")
    if not os.path.exists(config):
        if os.path.exists(os.path.join(path, "adapter_config.json")):
            raise ValueError(
                f"{path} holds an adapter without its model: give a function that loads both, --model module:function"
            )
        raise ValueError(f"{path} holds no config.json, so it is no Hugging Face model folder")
    try:
        with open(config, encoding="utf-8") as file:
            names = json.load(file).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config} is broken: {error}") from error
    if not names:
        raise ValueError(f"{config} names no architecture, which save_pretrained of a model writes")
    return str(names[0])


def _transformers() -> Any:
    """Import transformers, without its progress bars.

    Raises:
        ImportError: if it is missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f'a Hugging Face model folder takes transformers ({error}): pip install "wplfast[transformers]"'
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers
