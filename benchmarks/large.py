"""Models of the size that GPUs are for: a GPT-2, a ResNet-50 and word-level recurrent language models."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workloads import Batch, Decoder, Recurrent, Workload

BATCHES = 8  # of a whole call


class Autocast(nn.Module):
    """A float32 model under ``torch.autocast``; a float64 copy, as the oracle makes, runs as it is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Run the model in bfloat16 where autocast says so."""
        enabled = next(self.model.parameters()).dtype == torch.float32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=enabled):
            out: Tensor = self.model(x)
        return out


class Bottleneck(nn.Module):
    """A residual block 1x1, 3x3, 1x1 with four times the width on the outside."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.reduce, self.reduce_norm = nn.Conv2d(inside, width, 1, bias=False), nn.BatchNorm2d(width)
        self.across, self.across_norm = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.expand_norm = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = (
            nn.Identity()
            if inside == out and stride == 1
            else nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C, H, W] to [N, 4 width, H / stride, W / stride]."""
        y = F.relu(self.reduce_norm(self.reduce(x)))
        y = F.relu(self.across_norm(self.across(y)))
        return F.relu(self.expand_norm(self.expand(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """A residual network over images, in eval mode: batch statistics would couple the samples."""

    def __init__(self, width: int, depths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        blocks, inside = [], width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                blocks.append(Bottleneck(inside, width << stage, 2 if stage and block == 0 else 1))
                inside = 4 * (width << stage)
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(inside, classes)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map images [N, 3, H, W] to logits [N, classes]."""
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class WordLSTM(nn.Module):
    """A word-level language model around ``nn.LSTM``; cuDNN differentiates it in training mode only."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.cells = nn.LSTM(width, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map [N, T] to logits [N, T, V]."""
        return self.head(self.cells(self.tokens(tokens))[0])


def _gpt2(quick: bool, tied: bool = True) -> nn.Module:
    return Decoder(50, 8, 128, 2, tied) if quick else Decoder(50257, 512, 768, 12, tied)


def _resnet(quick: bool) -> nn.Module:
    return ResNet(8, (1, 1), 10) if quick else ResNet(64, (3, 4, 6, 3), 1000)


def _in_bf16(model: Callable[[bool], nn.Module], channels_last: bool = False) -> Callable[[bool], nn.Module]:
    order = torch.channels_last if channels_last else torch.preserve_format
    return lambda quick: model(quick).to(torch.bfloat16, memory_format=order)


def _text(n: int, length: int, vocabulary: int) -> Callable[[bool, torch.Generator], Batch]:
    def batch(quick: bool, generator: torch.Generator) -> Batch:
        size = (4, 8 + 1) if quick else (n, length + 1)
        tokens = torch.randint(50 if quick else vocabulary, size, generator=generator)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    return batch


def _images(dtype: torch.dtype, channels_last: bool) -> Callable[[bool, torch.Generator], Batch]:
    order = torch.channels_last if channels_last else torch.contiguous_format

    def batch(quick: bool, generator: torch.Generator) -> Batch:
        n, side, classes = (4, 32, 10) if quick else (64, 224, 1000)
        x = torch.randn(n, 3, side, side, generator=generator)
        return x.to(dtype, memory_format=order), torch.randint(classes, (n,), generator=generator)

    return batch


_GPT2, _RESNET = "GPT-2-small-like, tied head, N=8, T=512", "ResNet-50-like, 224x224, N=64"
_WORDS = "1000 hidden, V=10000, T=35, N=64"
_BF16, _FP32 = torch.bfloat16, torch.float32

#: By name; ratios of a Fisher pass to an ordinary one that they should not exceed are those of the smaller ones.
LARGE = {
    w.name: w
    for w in (
        Workload("gpt2", f"{_GPT2}, bf16", 1.2, _in_bf16(_gpt2), _text(8, 512, 50257), "bf16", BATCHES),
        Workload(
            "gpt2_untied",
            f"{_GPT2.replace('tied head', 'its head its own')}, bf16",
            1.2,
            lambda quick: _gpt2(quick, tied=False).bfloat16(),
            _text(8, 512, 50257),
            "bf16",
            BATCHES,
        ),
        Workload(
            "gpt2_autocast",
            f"{_GPT2}, fp32 under autocast to bf16",
            1.2,
            lambda quick: Autocast(_gpt2(quick)),
            _text(8, 512, 50257),
            "bf16",
            BATCHES,
        ),
        Workload(
            "resnet50",
            f"{_RESNET}, bf16, channels last",
            1.3,
            _in_bf16(_resnet, channels_last=True),
            _images(_BF16, channels_last=True),
            "bf16",
            BATCHES,
        ),
        Workload("resnet50_fp32", f"{_RESNET}, fp32", 1.3, _resnet, _images(_FP32, False), "fp32", BATCHES),
        Workload("resnet50_tf32", f"{_RESNET}, TF32", 1.3, _resnet, _images(_FP32, False), "tf32", BATCHES),
        Workload(
            "lstm",
            f"nn.LSTM, {_WORDS}, fp32",
            1.1,
            lambda quick: WordLSTM(50, 16) if quick else WordLSTM(10000, 1000),
            _text(64, 35, 10000),
            "fp32",
            BATCHES,
        ),
        Workload(
            "cell",
            f"RNN cell written with @, {_WORDS}, fp32",
            1.1,
            lambda quick: Recurrent(50, 16) if quick else Recurrent(10000, 1000),
            _text(64, 35, 10000),
            "fp32",
            BATCHES,
        ),
    )
}
