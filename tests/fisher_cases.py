"""Small models, their data and their loss: what tests of Fishers are about where the model does not matter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import wplfast

ce = wplfast.losses.cross_entropy


def mlp(dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4)).to(dtype)


def batches(sizes=(5, 5, 2), dtype=torch.float32):
    return [(torch.randn(n, 6, dtype=dtype), torch.randint(0, 4, (n,))) for n in sizes]


def tokens(n, t=33):
    return torch.randint(0, 101, (n, t)), torch.randint(0, 101, (n, t))


class Rnn(nn.Module):
    """A word-level language model with two recurrent layers."""

    def __init__(self, kind=nn.LSTM, vocabulary=101, width=48):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.rnn = kind(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens):
        return self.head(self.rnn(self.embedding(tokens))[0])


class Block(nn.Module):
    """Pre-norm attention and MLP, with scaled_dot_product_attention called by itself."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h):
        n, t, d = h.shape
        q, k, v = self.qkv(self.first(h)).view(n, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(a.transpose(1, 2).reshape(n, t, d))
        return h + self.down(F.gelu(self.up(self.second(h))))


class EncoderLayers(nn.TransformerEncoder):
    """PyTorch's own layers, with a causal mask."""

    def __init__(self, width, layers):
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, batch_first=True, norm_first=True)
        super().__init__(layer, layers, enable_nested_tensor=False)

    def forward(self, h):
        mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1], device=h.device, dtype=h.dtype)
        return super().forward(h, mask=mask, is_causal=True)


class Decoder(nn.Module):
    """A causal language model with learnt positions and a tied head."""

    def __init__(self, vocabulary=101, width=64, layers=2, length=70, blocks=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = blocks or nn.Sequential(*[Block(width) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(h)))


def cnn():
    """Convolutions, whole, with groups and depthwise; norms of batches and of groups."""
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(32, 48, 3, stride=2, groups=4), nn.GroupNorm(6, 48), nn.ReLU()]
    layers += [nn.Conv2d(48, 48, 3, groups=48), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(192, 10)]
    return nn.Sequential(*layers)


def wide_mlp():
    return nn.Sequential(nn.Linear(300, 257), nn.ReLU(), nn.Linear(257, 130), nn.ReLU(), nn.Linear(130, 10))


def digits(n):
    """Images of handwritten digits, another n at every call."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    chosen = torch.randperm(len(y), device="cpu")[:n].numpy()
    return torch.tensor(x[chosen], dtype=torch.float32) / 16, torch.tensor(y[chosen])


#: (model, inputs and targets of n samples)
MODELS = {
    "mlp": (wide_mlp, lambda n: (torch.randn(n, 300), torch.randint(0, 10, (n,)))),
    "digits": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), digits),
    "cnn": (cnn, lambda n: (torch.randn(n, 3, 24, 24), torch.randint(0, 10, (n,)))),
    "decoder": (Decoder, tokens),
    "encoder layers": (lambda: Decoder(width=32, blocks=EncoderLayers(32, 2)), lambda n: tokens(n, 12)),
    "lstm": (Rnn, tokens),
    "gru": (lambda: Rnn(nn.GRU), tokens),
}


def whole(tensors):
    """Return all of them as one vector in float64."""
    return torch.cat([t.double().flatten() for t in tensors])


def state_of(model):
    return {
        n: (type(p), id(p), p.detach().clone(), p.requires_grad, p.grad if p.grad is None else p.grad.clone())
        for n, p in model.named_parameters()
    }


def assert_same_state(model, before):
    for name, p in model.named_parameters():
        cls, identity, value, requires_grad, grad = before[name]
        assert type(p) is cls
        assert id(p) == identity
        assert torch.equal(p, value)
        assert p.requires_grad == requires_grad
        assert (p.grad is None) == (grad is None)
        assert grad is None or torch.equal(p.grad, grad)
