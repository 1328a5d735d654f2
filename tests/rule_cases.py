"""Models for every fast rule, in its variants."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo import C, Case, D, Lambda, V, head, par, pooled, sequence, token_targets, tokens


def signal(dims, channels=4, size=7):
    """[N, channels, 7, 6, 5][:dims]."""
    return lambda n, t: torch.randn(n, channels, *[size, size - 1, size - 2][:dims])


def after(layer, dims, channels=4, use=None):
    """A model whose layer is followed by a non-linear function and a head."""
    use = use or (lambda m, x: m.layer(x))

    def forward(m, x):
        return m.head(torch.tanh(use(m, x)).flatten(2).mean(2))

    return Case(
        lambda: Lambda(forward, layer=layer(), head=nn.LazyLinear(C)),
        signal(dims, channels),
        rules="conv" if "Conv" in type(layer()).__name__ else "norm",
    )


def perturbed(norm):
    """Give a norm weights, biases and statistics that are not the initial ones."""
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return norm


def frozen(module, name):
    getattr(module, name).requires_grad_(False)
    return module


def twice(m, x):
    return m.layer(torch.tanh(m.layer(x)))


def frames(m, x):
    """A sample's positions along the first spatial dimension as images of their own: [N * T, C, L]."""
    n, c, t = x.shape[:3]
    h = m.layer(x.transpose(1, 2).reshape(n * t, c, *x.shape[3:]))
    return h.unflatten(0, (n, t)).transpose(1, 2)


CONVOLUTIONS = {
    "1d": after(lambda: nn.Conv1d(4, 6, 3), 1),
    "2d": after(lambda: nn.Conv2d(4, 6, 3), 2),
    "3d": after(lambda: nn.Conv3d(4, 3, 2), 3),
    "no bias": after(lambda: nn.Conv2d(4, 6, 3, bias=False), 2),
    "1x1": after(lambda: nn.Conv2d(4, 6, 1), 2),
    "patches": after(lambda: nn.Conv2d(4, 6, 2, stride=2), 2),
    "strided, padded, dilated": after(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)), 2
    ),
    "same": after(lambda: nn.Conv2d(4, 6, 3, padding="same"), 2),
    "same, even kernel": after(lambda: nn.Conv2d(4, 6, (4, 2), padding="same"), 2),
    "valid": after(lambda: nn.Conv1d(4, 6, 3, padding="valid"), 1),
    **{
        mode: after(lambda mode=mode: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode=mode), 2)
        for mode in ("reflect", "replicate", "circular")
    },
    "grouped": after(lambda: nn.Conv2d(4, 6, 3, groups=2), 2),
    "depthwise": after(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), 2),
    "depthwise, multiplied": after(lambda: nn.Conv1d(4, 8, 3, padding=2, groups=4), 1),
    "depthwise 3d": after(lambda: nn.Conv3d(4, 4, 2, groups=4), 3),
    "kernel as large as the input": after(lambda: nn.Conv2d(4, 6, (7, 6)), 2),
    "transposed 1d": after(lambda: nn.ConvTranspose1d(4, 6, 3), 1),
    "transposed 2d": after(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), 2),
    "transposed 3d": after(lambda: nn.ConvTranspose3d(4, 3, 2), 3),
    "transposed, grouped, dilated": after(lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), 2),
    "transposed, depthwise": after(lambda: nn.ConvTranspose2d(4, 4, 3, groups=4), 2),
    "used twice": after(lambda: nn.Conv2d(4, 4, 3, padding=1), 2, use=twice),
    "weight norm": after(lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), 1),
    "frames [N * T]": after(lambda: nn.Conv1d(4, 6, 3), 2, use=frames),
    "channels last": after(
        lambda: nn.Conv2d(4, 6, 3, padding=1), 2, use=lambda m, x: m.layer(x.to(memory_format=torch.channels_last))
    ),
    "weight alone": after(lambda: frozen(nn.Conv2d(4, 6, 3), "bias"), 2),
    "bias alone": after(lambda: frozen(nn.Conv2d(4, 6, 3), "weight"), 2),
}


def norm_of_features(layer):
    return Case(
        lambda: Lambda(lambda m, x: pooled(m, torch.tanh(m.layer(x) * x)), layer=layer(), head=head()),
        sequence,
        rules="norm",
    )


NORMS = {
    "layer": norm_of_features(lambda: perturbed(nn.LayerNorm(D))),
    "layer, no bias": norm_of_features(lambda: perturbed(nn.LayerNorm(D, bias=False))),
    "layer, bias alone": norm_of_features(lambda: frozen(perturbed(nn.LayerNorm(D)), "weight")),
    "rms": norm_of_features(lambda: perturbed(nn.RMSNorm(D))),
    "layer over two dimensions": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.tanh(m.layer(x)).flatten(1)),
            layer=perturbed(nn.LayerNorm((4, D))),
            head=nn.Linear(4 * D, C),
        ),
        lambda n, t: torch.randn(n, 4, D),
        rules="norm",
    ),
    "layer of time first": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.tanh(m.layer(x.transpose(0, 1)) * 2).mean(0)),
            layer=perturbed(nn.LayerNorm(D)),
            head=head(),
        ),
        sequence,
        rules="norm",
    ),
    "layer used twice": Case(
        lambda: Lambda(
            lambda m, x: pooled(m, m.layer(torch.tanh(m.layer(x)) ** 2)), layer=perturbed(nn.LayerNorm(D)), head=head()
        ),
        sequence,
        rules="norm",
    ),
    "group": after(lambda: perturbed(nn.GroupNorm(2, 4)), 2),
    "group, a sequence": after(lambda: perturbed(nn.GroupNorm(2, 4)), 1),
    "instance": after(lambda: perturbed(nn.InstanceNorm2d(4, affine=True)), 2),
    "instance, running statistics": after(
        lambda: perturbed(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)), 1
    ),
    "batch 1d": after(lambda: perturbed(nn.BatchNorm1d(4)), 1),
    "batch 2d": after(lambda: perturbed(nn.BatchNorm2d(4)), 2),
    "batch 3d": after(lambda: perturbed(nn.BatchNorm3d(4)), 3),
    "batch of [N, D]": Case(
        lambda: Lambda(
            lambda m, x: m.head(torch.tanh(m.layer(x) * x)), layer=perturbed(nn.BatchNorm1d(D)), head=head()
        ),
        lambda n, t: torch.randn(n, D),
        rules="norm",
    ),
    "batch, frames [N * T]": after(lambda: perturbed(nn.BatchNorm1d(4)), 2, use=frames),
}


class Buffer(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.register_buffer("buffer", tensor)


def lookup(table, take, rule="embedding"):
    def forward(m, x):
        return m.head(torch.tanh(take(m, x)))

    return Case(
        lambda: Lambda(forward, **{k: make() for k, make in table.items()}, head=nn.Linear(D, V)),
        tokens,
        token_targets,
        rules=rule,
    )


E = {"embedding": lambda: nn.Embedding(V, D)}
BAG = {"bag": lambda: nn.EmbeddingBag(V, D)}
LOOKUPS = {
    "embedding": lookup(E, lambda m, x: m.embedding(x)),
    "padding": lookup({"embedding": lambda: nn.Embedding(V, D, padding_idx=3)}, lambda m, x: m.embedding(x)),
    "padding from the end": lookup(
        {"embedding": lambda: nn.Embedding(V, D, padding_idx=-1)}, lambda m, x: m.embedding(x)
    ),
    "used twice": lookup(E, lambda m, x: m.embedding(x) * m.embedding(x.flip(1))),
    "time first": lookup(E, lambda m, x: m.embedding(x.t()).transpose(0, 1)),
    "flattened": lookup(E, lambda m, x: m.embedding(x.reshape(-1)).unflatten(0, x.shape)),
    "indexed": lookup(E, lambda m, x: m.embedding.weight[x]),
    "indexed from the end": lookup(E, lambda m, x: m.embedding.weight[x - V]),
    "max norm": lookup({"embedding": lambda: nn.Embedding(V, D, max_norm=1.0)}, lambda m, x: m.embedding(x)),
    "token types from a buffer": lookup(
        {**E, "types": lambda: nn.Embedding(2, D), "keep": lambda: Buffer(torch.zeros(1, 9, dtype=torch.long))},
        lambda m, x: m.embedding(x) + m.types(m.keep.buffer[:, : x.shape[1]].expand(len(x), -1)),
    ),
    "positions from a buffer": lookup(
        {**E, "positions": lambda: nn.Embedding(9, D), "keep": lambda: Buffer(torch.arange(9).unsqueeze(0))},
        lambda m, x: m.embedding(x) + m.positions(m.keep.buffer[:, : x.shape[1]]),
    ),
    "bags": lookup(
        BAG, lambda m, x: m.bag(x).unsqueeze(1) + m.bag(x.reshape(-1, 1)).view(*x.shape, D), "embedding bag"
    ),
    "largest of bags": lookup(
        {"bag": lambda: nn.EmbeddingBag(V, D, mode="max")},
        lambda m, x: m.bag(x.reshape(-1, 1)).view(*x.shape, D) * m.bag(x).unsqueeze(1),
        "embedding bag",
    ),
}


def function(use, rule, inputs=sequence, **parameters):
    """A model that applies one function to [N, T, D] data and parameters."""
    return Case(
        lambda: Lambda(
            lambda m, x: pooled(m, torch.tanh(use(m, x))), **{k: par(*s) for k, s in parameters.items()}, head=head()
        ),
        inputs,
        rules=rule,
    )


def shuffled_cat(m, x):
    rows = x.reshape(-1, D)
    order = rows.sum(1).argsort()
    joined = torch.cat([rows[order], m.p.expand(len(rows), -1)], -1).prod(-1, keepdim=True)
    return torch.zeros_like(rows).index_copy(0, order, joined * rows[order]).view_as(x)


FUNCTIONS = {
    "x @ w": function(lambda m, x: x @ m.w, "matmul", w=(D, D)),
    "x @ w.t()": function(lambda m, x: x @ m.w.t(), "matmul", w=(D, D)),
    "w @ x": function(lambda m, x: (m.w @ x.transpose(1, 2)).transpose(1, 2), "matmul", w=(D, D)),
    "w @ x, samples in columns": function(lambda m, x: (m.w @ x[:, 0].t()).t().unsqueeze(1), "matmul", w=(D, D)),
    "torch.mm": function(lambda m, x: torch.mm(x[:, 0], m.w).unsqueeze(1), "matmul", w=(D, D)),
    "addmm": function(lambda m, x: torch.addmm(m.b, x.reshape(-1, D), m.w).view_as(x), "matmul", w=(D, D), b=(D,)),
    "addmm, alpha": function(
        lambda m, x: torch.addmm(m.b, x.reshape(-1, D), m.w, alpha=2).view_as(x), "generic", w=(D, D), b=(D,)
    ),
    "F.linear of a slice": function(lambda m, x: F.linear(x, m.w[1:]), "linear", w=(D + 1, D)),
    "linear in double precision, cast": function(
        lambda m, x: F.linear(x.float(), m.w.float()).double() if x.dtype == torch.float64 else F.linear(x, m.w),
        "linear",
        w=(D, D),
    ),
    "einsum ntd,dk->ntk": function(lambda m, x: torch.einsum("ntd,dk->ntk", x, m.w), "einsum", w=(D, D)),
    "einsum kd,ntd->ntk": function(lambda m, x: torch.einsum("kd, ntd -> ntk", m.w, x), "einsum", w=(D, D)),
    "einsum, heads": function(
        lambda m, x: torch.einsum("ntd,dhk->nhtk", x, m.w).transpose(1, 2).flatten(2), "einsum", w=(D, 2, D // 2)
    ),
    "einsum, heads merged": function(
        lambda m, x: torch.einsum("nthk,hkd->ntd", x.unflatten(2, (2, -1)), m.w), "einsum", w=(2, D // 2, D)
    ),
    "einsum, ellipsis": function(lambda m, x: torch.einsum("...d,dk->...k", x, m.w), "einsum", w=(D, D)),
    "einsum, shared letter": function(
        lambda m, x: torch.einsum("ntd,td->ntd", x, m.w[: x.shape[1]]), "einsum", w=(6, D)
    ),
    "x * p": function(lambda m, x: x * m.p, "scale", p=(D,)),
    "p * x": function(lambda m, x: m.p * x, "scale", p=(1, 1, D)),
    "x * scalar": function(lambda m, x: x * m.p, "scale", p=()),
    "x *= p": function(lambda m, x: torch.tanh(x).mul_(m.p), "scale", p=(D,)),
    "x / p": function(lambda m, x: x / (m.p + 3), "scale", p=(D,)),
    "x / scalar": function(lambda m, x: x / m.p, "scale", p=(1,)),
    "x[..., None] * p": function(lambda m, x: (x.unsqueeze(-1) * m.p).sum(-1), "scale", p=(D, 3)),
    "x * p expanded": function(lambda m, x: x * m.p.expand(x.shape[1], D), "scale", p=(D,)),
    "steps that differ": function(
        lambda m, x: torch.stack([x[:, 0] - m.p, m.p - x[:, 1], torch.add(x[:, 0], m.p, alpha=2), x[:, 1] + m.p], 1),
        "shift",
        p=(D,),
    ),
    "steps with different views": function(
        lambda m, x: torch.stack(
            [F.linear(x[:, 0], m.w[:D]), F.linear(x[:, 1], m.w[1:]), F.linear(x[:, 1], m.w[:D])], 1
        ),
        "linear",
        w=(D + 1, D),
    ),
    "expanded and copied": function(lambda m, x: x @ m.w[:1].expand(D, D).clone(), "matmul", w=(D, D)),
    "an overlapping view": function(lambda m, x: x @ m.w.view(-1).unfold(0, D, 1)[:D], "matmul", w=(D, D)),
    "rows of one sample at a time": function(
        lambda m, x: torch.stack([F.linear(row, m.w) for row in x])[:, -1:], "linear", w=(D, D)
    ),
    "x + p": function(lambda m, x: x + m.p, "shift", p=(D,)),
    "p - x": function(lambda m, x: m.p - x, "shift", p=(1, D)),
    "torch.add, alpha": function(lambda m, x: torch.add(x, m.p, alpha=3), "shift", p=(D,)),
    "x + p expanded over samples": function(lambda m, x: x + m.p.expand(len(x), -1, -1), "shift", p=(1, 1, D)),
    "x + p repeated over samples": function(lambda m, x: x + m.p.repeat(len(x), 1, 1), "shift", p=(1, 1, D)),
    "cat of an expanded token": function(
        lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x, m.p.expand(len(x), 2, -1)], 1), "cat", p=(1, 1, D)
    ),
    "cat of a repeated token": function(
        lambda m, x: torch.cat((x, m.p.repeat(len(x), 1, 1)), dim=-2), "cat", p=(1, 2, D)
    ),
    "cat of shuffled rows": function(shuffled_cat, "cat", p=(2,)),
    "bias of a convolution, samples in columns": function(
        lambda m, x: F.conv1d(x.permute(1, 2, 0), torch.eye(D).to(x).unsqueeze(-1), m.b).permute(2, 0, 1),
        "conv",
        b=(D,),
    ),
    "einsum, one weight split in two ways": function(
        lambda m, x: torch.einsum("ntij,ijk->ntk", torch.einsum("ntd,dhk->nthk", x, m.w), m.w), "einsum", w=(D, D, D)
    ),
    "where": function(lambda m, x: torch.where(x > 0, x, m.p), "select", p=(D,)),
    "where, a mask of positions": function(
        lambda m, x: x + torch.where(torch.arange(D) > 2, m.p.expand(len(x), x.shape[1], D), x), "select", p=(D,)
    ),
    "where, of two parameters": function(lambda m, x: x * torch.where(x > 0, m.p, m.q), "select", p=(D,), q=(1, D)),
    "masked_fill": function(lambda m, x: x * m.p.expand_as(x).masked_fill(x < 0, 0.1), "select", p=(D,)),
    "derived from a cast": function(lambda m, x: x * (1 + m.p.to(x.dtype)), "scale", p=(D,)),
    "cast by type": function(lambda m, x: F.linear(x, m.w.type(x.dtype)), "linear", w=(D, D)),
    "attention with a bias table": function(
        lambda m, x: F.scaled_dot_product_attention(x, x, x, attn_mask=m.p[: x.shape[1], : x.shape[1]]),
        "shift",
        p=(6, 6),
    ),
    "causal attention of a learnt query scale": function(
        lambda m, x: F.scaled_dot_product_attention(x * m.p, x, x, is_causal=True, scale=0.5), "scale", p=(D,)
    ),
    "x @ w, many matrices": function(lambda m, x: (x.unsqueeze(1) @ m.w).sum(1), "batched matmul", w=(3, D, D)),
    "x @ w, a vector": function(lambda m, x: (x @ m.w).unsqueeze(-1) * x, "batched matmul", w=(D,)),
    "einsum with many matrices": function(
        lambda m, x: torch.einsum("ntd,edk->entk", x, m.w).prod(0), "einsum", w=(2, D, D)
    ),
    "cast, then used": function(lambda m, x: m.p.to(x.dtype) * x + m.p.type_as(x), "scale", p=(D,)),
}


def squashed_pair(m, x, **options):
    """y = x W tanh(x) + b."""
    return F.bilinear(x, torch.tanh(x), m.w, getattr(m, "b", None), **options)


def routed(m, x):
    """Rows of all samples in the order of their sums, without those whose sums are small."""
    rows = x.reshape(-1, D)
    order = rows.sum(1).argsort()
    order = order[rows.sum(1)[order] > -1]
    mixed = F.bilinear(rows[order], torch.sin(rows[order]), m.w, m.b)
    return torch.zeros_like(rows).index_copy(0, order, mixed).view_as(x) + x


def bilinear(use=squashed_pair, rule="bilinear", make=None, **parameters):
    """A model that applies F.bilinear to [N, T, D] data, with a weight [D, D, D] and a bias unless told otherwise."""
    parameters = parameters or ({} if make else {"w": (D, D, D), "b": (D,)})
    made = {k: (lambda s=s: par(*s)) for k, s in parameters.items()} | (make or {})
    return Case(
        lambda: Lambda(
            lambda m, x: pooled(m, torch.tanh(use(m, x))), **{k: new() for k, new in made.items()}, head=head()
        ),
        sequence,
        rules=rule,
    )


BILINEARS = {
    "module": bilinear(lambda m, x: m.layer(x, torch.tanh(x)), make={"layer": lambda: nn.Bilinear(D, D, D)}),
    "no bias": bilinear(w=(D, D, D)),
    "weight alone": bilinear(
        lambda m, x: m.layer(x, x.flip(1)), make={"layer": lambda: frozen(nn.Bilinear(D, D, D), "bias")}
    ),
    "bias alone": bilinear(lambda m, x: m.layer(x, x), make={"layer": lambda: frozen(nn.Bilinear(D, D, D), "weight")}),
    "keywords": bilinear(lambda m, x: F.bilinear(bias=m.b, input2=torch.tanh(x), weight=m.w, input1=x)),
    "sizes that differ": bilinear(lambda m, x: F.bilinear(x[..., :3], x[..., 1:], m.w, m.b), w=(D, 3, 5), b=(D,)),
    "scores": bilinear(lambda m, x: squashed_pair(m, x) * x, w=(1, D, D), b=(1,)),
    "one feature": bilinear(lambda m, x: F.bilinear(x, x[..., :1], m.w), w=(D, D, 1)),
    "rows [N, D]": bilinear(lambda m, x: squashed_pair(m, x[:, 0]).unsqueeze(1)),
    "four dimensions": bilinear(lambda m, x: squashed_pair(m, torch.stack([x, x.flip(1)], 1)).prod(1)),
    "time first": bilinear(lambda m, x: squashed_pair(m, x.transpose(0, 1)).transpose(0, 1)),
    "flattened": bilinear(lambda m, x: squashed_pair(m, x.reshape(-1, D)).view_as(x)),
    "routed": bilinear(routed),
    "rows of one sample at a time": bilinear(lambda m, x: torch.stack([squashed_pair(m, row) for row in x])),
    "used twice": bilinear(lambda m, x: squashed_pair(m, torch.tanh(squashed_pair(m, x)))),
    "used by itself and by einsum": bilinear(
        lambda m, x: squashed_pair(m, x) + torch.einsum("ntd,dhk->nthk", x, m.w).mean(2)
    ),
    "used by itself and by another rule": bilinear(lambda m, x: squashed_pair(m, x) * m.b),
    "a slice of the weight": bilinear(lambda m, x: F.bilinear(x, torch.tanh(x), m.w[1:]), w=(D + 1, D, D)),
    "two slices of the weight": bilinear(
        lambda m, x: F.bilinear(x, x, m.w[:D]) * F.bilinear(x, x.flip(1), m.w[D:]), w=(2 * D, D, D)
    ),
    "a transposed weight": bilinear(lambda m, x: F.bilinear(x, x[..., 1:4], m.w.permute(2, 0, 1)), w=(D, 3, D)),
    "an expanded weight": bilinear(lambda m, x: F.bilinear(x, torch.tanh(x), m.w.expand(D, D, D)), w=(1, D, D)),
    "a constant on one side": bilinear(
        lambda m, x: F.bilinear(m.keep.buffer[: x.shape[1]].expand_as(x), x, m.w, m.b),
        make={"keep": lambda: Buffer(torch.randn(6, D)), "w": lambda: par(D, D, D), "b": lambda: par(D)},
    ),
    "an expanded parameter on one side": bilinear(
        lambda m, x: F.bilinear(m.p.expand_as(x), x, m.w, m.b), w=(D, D, D), b=(D,), p=(1, 1, D)
    ),
    "an expanded parameter on the other": bilinear(
        lambda m, x: F.bilinear(x, m.p.expand_as(x), m.w), w=(D, D, D), p=(1, 1, D)
    ),
    "a parameter beside a frozen weight": bilinear(
        lambda m, x: m.layer(x, m.p.expand_as(x)),
        make={"layer": lambda: nn.Bilinear(D, D, D).requires_grad_(False), "p": lambda: par(D)},
    ),
    "a repeated parameter on one side": bilinear(
        lambda m, x: F.bilinear(m.p.repeat(*x.shape[:2], 1), x, m.w), w=(D, D, D), p=(1, 1, D)
    ),
}
