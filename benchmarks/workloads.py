"""What the Fisher pass is measured on: models, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .models import Autocast, Decoder, Recurrent, ResNet, WordLSTM, cnn, mlp

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # outputs, targets -> a loss per sample
Draw = Callable[[bool, torch.Generator], Batch]


@dataclass(frozen=True)
class Workload:
    """A model and a source of batches.

    Args:
        name: as on the command line.
        shown: what it is.
        target: the ratio of a Fisher pass to an ordinary pass that it should not exceed.
        model: makes the model; ``quick`` asks for a tiny one.
        batch: makes a batch for it.
        precision: "fp32"; or "bf16" or "tf32", where an error is measured in that of a one-sample loop of the same
            precision.
        batches: of a whole call.
    """

    name: str
    shown: str
    target: float
    model: Callable[[bool], nn.Module]
    batch: Draw
    precision: str = "fp32"
    batches: int = 32


def rows(n: int, *shape: int, classes: int = 10) -> Draw:
    """Return what draws numbers of a shape, and classes."""

    def draw(quick: bool, generator: torch.Generator) -> Batch:
        size = 4 if quick else n
        return torch.randn(size, *shape, generator=generator), torch.randint(classes, (size,), generator=generator)

    return draw


def text(n: int, length: int, vocabulary: int) -> Draw:
    """Return what draws tokens, and the tokens that come next."""

    def draw(quick: bool, generator: torch.Generator) -> Batch:
        size = (4, 8 + 1) if quick else (n, length + 1)
        tokens = torch.randint(50 if quick else vocabulary, size, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return draw


def images(dtype: torch.dtype, order: torch.memory_format) -> Draw:
    """Return what draws images as ImageNet's, and classes."""

    def draw(quick: bool, generator: torch.Generator) -> Batch:
        n, side, classes = (4, 32, 10) if quick else (64, 224, 1000)
        x = torch.randn(n, 3, side, side, generator=generator)
        return x.to(dtype, memory_format=order), torch.randint(classes, (n,), generator=generator)

    return draw


def _decoder(tied: bool) -> Callable[[bool], nn.Module]:
    return lambda quick: Decoder(50, 8, 16, 1, tied) if quick else Decoder(1000, 128, 256, 4, tied)


def _gpt2(quick: bool, tied: bool = True) -> nn.Module:
    return Decoder(50, 8, 128, 2, tied) if quick else Decoder(50257, 512, 768, 12, tied)


def _resnet(quick: bool) -> nn.Module:
    return ResNet(8, (1, 1), 10) if quick else ResNet(64, (3, 4, 6, 3), 1000)


def _cell(vocabulary: int, width: int) -> Callable[[bool], nn.Module]:
    return lambda quick: Recurrent(50, 16) if quick else Recurrent(vocabulary, width)


def _by_name(*workloads: Workload) -> dict[str, Workload]:
    return {workload.name: workload for workload in workloads}


#: The small ones.
WORKLOADS = _by_name(
    Workload(
        "mlp", "MLP 784-1024-1024-10, N=256", 1.05,
        lambda quick: mlp(784, 32, 32, 10) if quick else mlp(784, 1024, 1024, 10), rows(256, 784),
    ),
    Workload(
        "cnn", "CNN 3x(conv 3x3, relu, pool) 32-64-128, 32x32, N=64", 1.1,
        lambda quick: cnn((3, 4, 4, 4) if quick else (3, 32, 64, 128)), rows(64, 3, 32, 32),
    ),
    Workload("decoder", "decoder d=256, 4 layers, V=1000, T=128, N=16", 1.05, _decoder(False), text(16, 128, 1000)),
    Workload("tied", "the same decoder, tied head", 1.05, _decoder(True), text(16, 128, 1000)),
    Workload("rnn", "RNN cell written with @, d=256, V=500, T=35, N=32", 1.1, _cell(500, 256), text(32, 35, 500)),
)  # fmt: skip

_GPT2, _RESNET = "GPT-2-small-like, tied head, N=8, T=512", "ResNet-50-like, 224x224, N=64"
_WORDS, _TOKENS, _STREAM = "1000 hidden, V=10000, T=35, N=64", text(8, 512, 50257), text(64, 35, 10000)
_LAST, _FLOAT = torch.channels_last, images(torch.float32, torch.contiguous_format)

#: Those that GPUs are for; ratios that they should not exceed are those of the smaller ones.
LARGE = _by_name(
    Workload("gpt2", f"{_GPT2}, bf16", 1.2, lambda quick: _gpt2(quick).bfloat16(), _TOKENS, "bf16", 8),
    Workload(
        "gpt2_untied", f"{_GPT2.replace('tied head', 'its head its own')}, bf16", 1.2,
        lambda quick: _gpt2(quick, tied=False).bfloat16(), _TOKENS, "bf16", 8,
    ),
    Workload(
        "gpt2_autocast", f"{_GPT2}, fp32 under autocast to bf16", 1.2,
        lambda quick: Autocast(_gpt2(quick)), _TOKENS, "bf16", 8,
    ),
    Workload(
        "resnet50", f"{_RESNET}, bf16, channels last", 1.3,
        lambda quick: _resnet(quick).to(torch.bfloat16, memory_format=_LAST), images(torch.bfloat16, _LAST), "bf16", 8,
    ),
    Workload("resnet50_fp32", f"{_RESNET}, fp32", 1.3, _resnet, _FLOAT, "fp32", 8),
    Workload("resnet50_tf32", f"{_RESNET}, TF32", 1.3, _resnet, _FLOAT, "tf32", 8),
    Workload(
        "lstm", f"nn.LSTM, {_WORDS}, fp32", 1.1,
        lambda quick: WordLSTM(50, 16) if quick else WordLSTM(10000, 1000), _STREAM, "fp32", 8,
    ),
    Workload("cell", f"RNN cell written with @, {_WORDS}, fp32", 1.1, _cell(10000, 1000), _STREAM, "fp32", 8),
)  # fmt: skip
KNOWN = WORKLOADS | LARGE
