"""What ranks do with models in FSDP2; :mod:`test_fsdp2` says what must come out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from oracle import fisher_loop
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import wplfast
from wplfast import fisher_diagonal

ce = wplfast.losses.cross_entropy
V, D, T = 13, 8, 5  # neither 2 nor 4 divides V; the last of 4 ranks has no row of T

#: Batches of each rank; of two ranks the first two. The third has no data.
SIZES = [(3, 2, 1), (4,), (), (1, 2)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n, self.m = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.o, self.up, self.down = (
            nn.Linear(a, b) for a, b in ((D, 3 * D), (D, D), (D, 2 * D), (2 * D, D))
        )

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.n(h)).chunk(3, -1)
        h = h + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return h + self.down(F.gelu(self.up(self.m(h))))


class GPT(nn.Module):
    """A decoder; ``recompute`` is how its blocks are checkpointed, ``rows`` whether positions are looked up by row."""

    def __init__(self, tied: bool = False, recompute: bool | None = None, by_rows: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(V, D), nn.Embedding(T, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.recompute, self.by_rows = recompute, by_rows

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1]) if not self.by_rows else torch.arange(x.shape[1]).expand_as(x)
        h = self.tokens(x) + self.places(steps)
        for block in self.blocks:
            h = block(h) if self.recompute is None else checkpoint(block, h, use_reentrant=self.recompute)
        return self.head(h)


def model(**options) -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    return GPT(**options).double()


def sharded(whole: nn.Module, wrap: str = "each", **options) -> nn.Module:
    """Apply ``fully_shard`` to each part and the root, to the blocks and the root, to the root or the blocks alone."""
    if wrap != "root":
        for block in whole.blocks:
            fully_shard(block, **options)
    if wrap == "each":
        fully_shard(whole.tokens, **options)
        fully_shard(whole.head, **options)
    if wrap != "blocks":
        fully_shard(whole, **options)
    return whole


def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randint(V, (n, T + 1), generator=torch.Generator().manual_seed(seed))
    return x[:, :-1], x[:, 1:]


def data(rank: int, sizes=SIZES) -> list[tuple[Tensor, Tensor]]:
    """A rank's own batches."""
    return [batch(n, 10 * rank + i) for i, n in enumerate(sizes[rank])]


def everything(n_ranks: int, sizes=SIZES) -> list[tuple[Tensor, Tensor]]:
    return [one for rank in range(n_ranks) for one in data(rank, sizes)]


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def off(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to each tensor's largest entry (or to 1e-3 of the largest of all)."""
    assert found.keys() == expected.keys()
    floor = 1e-3 * max(float(e.abs().max()) for e in expected.values())
    return max(float((full(found[k]) - e).abs().max()) / max(float(e.abs().max()), floor) for k, e in expected.items())


def alike(fisher: Mapping[str, Tensor], module: nn.Module) -> bool:
    """Whether F lies as the parameters do."""
    pairs = [(fisher[name], p) for name, p in module.named_parameters() if name in fisher]
    return len(pairs) == len(fisher) and all(
        not isinstance(p, DTensor)
        or (
            f.placements == p.placements and f.device_mesh == p.device_mesh and f.to_local().shape == p.to_local().shape
        )
        for f, p in pairs
    )


def steps_as_before(module: nn.Module, whole: nn.Module) -> float:
    """An ordinary step after a pass: how far its gradients are off."""
    x, y = batch(4, 99)
    for one in (module, whole):
        one.train()
        one.zero_grad()
        ce(one(x), y).mean().backward()
    return off(
        {n: p.grad for n, p in module.named_parameters() if p.grad is not None},
        {n: p.grad for n, p in whole.named_parameters() if p.grad is not None},
    )


def compare(rank: int, n: int, whole: nn.Module, module: nn.Module, sizes=SIZES, loss=ce, **options) -> dict:
    """A Fisher of all ranks against the loop of one process over all data."""
    expected = fisher_loop(whole.eval(), everything(n, sizes), loss)
    flags = [p.requires_grad for p in module.parameters()]
    fisher = fisher_diagonal(module, data(rank, sizes), loss, **options)
    return {
        "off": off(fisher, expected),
        "n": fisher.n_samples,
        "alike": alike(fisher, module),
        "flags": flags == [p.requires_grad for p in module.parameters()],
        "step": steps_as_before(module, whole),
        "slow": fisher.report.slow,
    }


# ---- the Fisher: wrappings and models --------------------------------------------------------------------------------


def _wrapping(rank, n, wrap, reshard):
    return compare(rank, n, model(), sharded(model(), wrap, reshard_after_forward=reshard))


def each_part(rank, n):
    return _wrapping(rank, n, "each", True)


def each_part_kept(rank, n):
    return _wrapping(rank, n, "each", False)


def nested(rank, n):
    return _wrapping(rank, n, "nested", True)


def nested_kept(rank, n):
    return _wrapping(rank, n, "nested", False)


def root_alone(rank, n):
    return _wrapping(rank, n, "root", True)


def blocks_alone(rank, n):
    return _wrapping(rank, n, "blocks", True)


def tied_embeddings(rank, n):
    return compare(rank, n, model(tied=True), sharded(model(tied=True), "nested"))


def frozen_parts(rank, n):
    pair = [model(), model()]
    for one in pair:
        one.tokens.requires_grad_(False)
        one.blocks[0].qkv.requires_grad_(False)
    return compare(rank, n, pair[0], sharded(pair[1]))


def a_part_of_the_parameters(rank, n):
    whole, module = model(), sharded(model())
    expected = fisher_loop(whole, everything(n), ce, _part(whole))
    fisher = fisher_diagonal(module, data(rank), ce, params=_part(module))
    return {"off": off(fisher, expected), "n": fisher.n_samples, "step": steps_as_before(module, whole)}


def _part(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if name.startswith("blocks.1.")}


def checkpoints(rank, n):
    return compare(rank, n, model(), sharded(model(recompute=False)))


def reentrant_checkpoints(rank, n):
    return compare(rank, n, model(), sharded(model(recompute=True)))


def wrapped_checkpoints(rank, n):
    """``fully_shard`` on the checkpoint wrapper's module, as torchtitan does."""
    module = model()
    for i, block in enumerate(module.blocks):
        module.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    whole = model()
    module = sharded(module)
    expected = fisher_loop(whole, everything(n), ce)
    fisher = fisher_diagonal(module, data(rank), ce).rename(
        lambda name: name.replace("_checkpoint_wrapped_module.", "")
    )
    return {"off": off(fisher, expected), "n": fisher.n_samples}


def cpu_offload(rank, n):
    return compare(rank, n, model(), sharded(model(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def columns(rank, n):
    """Some parameters sharded along dimension 1."""
    place = lambda p: Shard(1) if p.dim() == 2 and p.shape[1] % n == 0 else Shard(0)  # noqa: E731
    return compare(rank, n, model(), sharded(model(), shard_placement_fn=place))


def replicated_shards(rank, n):
    mesh = init_device_mesh("cpu", (n // 2, 2), mesh_dim_names=("replicate", "shard"))
    return compare(rank, n, model(), sharded(model(), mesh=mesh))


def mixed_precision(rank, n):
    """bfloat16 in the blocks, on the same rounded weights as the loop in float64."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    whole = GPT()
    module = sharded(GPT(), mp_policy=policy)
    module.load_state_dict({k: _as(v, module.state_dict()[k]) for k, v in whole.state_dict().items()})
    expected = fisher_loop(whole.bfloat16(), everything(n), ce)
    fisher = fisher_diagonal(module, data(rank), ce)
    one = fisher_diagonal(whole, [tuple(map(torch.cat, zip(*everything(n), strict=True)))], ce, reduce=False)
    return {
        "off": off(fisher, expected),
        "off in one process": off(one, expected),
        "dtypes": {f.dtype for f in fisher.values()},
        "alike": alike(fisher, module),
    }


def _as(tensor: Tensor, shard: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, shard.device_mesh, shard.placements) if isinstance(shard, DTensor) else tensor


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(3, base.in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(base.out_features, 3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.t() @ self.b.t()


def lora(rank, n):
    """Adapters on a frozen base, both sharded."""
    pair = []
    for _ in range(2):
        pair.append(model().requires_grad_(False))
        for block in pair[-1].blocks:
            block.qkv, block.down = LoRA(block.qkv), LoRA(block.down)
    return compare(rank, n, pair[0], sharded(pair[1]))


class Doubled(torch.autograd.Function):
    """Uses a weight where no torch function is seen."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).sum((0, 1))


class Hidden(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(V))

    def forward(self, x):
        return Doubled.apply(super().forward(x), self.scale)


def unseen_function(rank, n):
    """Its parameter takes a backward pass for each sample, more on one rank than on another."""
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(Hidden().double())
    return compare(rank, n, pair[0], sharded(pair[1]))


def unseen_in_half_precision(rank, n):
    """FSDP2 takes gradients of bfloat16 away to widen them."""
    policy, pair = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(Hidden())
    module, whole = sharded(pair[1], mp_policy=policy), pair[0].bfloat16()
    one = fisher_diagonal(whole, everything(n), ce, reduce=False)
    fisher = fisher_diagonal(module, data(rank), ce)
    return {"off": off(fisher, one), "slow": fisher.report.slow, "n": fisher.n_samples}


def routed_rows(rank, n):
    """Rows in another order in every batch: measured each time."""

    class Routed(GPT):
        def forward(self, x):
            h = self.tokens(x).reshape(-1, D)
            order = x.reshape(-1).argsort(stable=True)
            h = self.blocks[0].up(h[order])[order.argsort()]
            return self.head(h[:, :D].reshape(*x.shape, D))

    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        pair.append(Routed().double())
    return compare(rank, n, pair[0], sharded(pair[1], "root"))


def positions_by_row(rank, n):
    return compare(rank, n, model(by_rows=True), sharded(model(by_rows=True)))


WRAPPINGS = [each_part, each_part_kept, nested, nested_kept, root_alone, blocks_alone]
MODELS = [
    tied_embeddings,
    frozen_parts,
    a_part_of_the_parameters,
    checkpoints,
    reentrant_checkpoints,
    wrapped_checkpoints,
    cpu_offload,
    columns,
    replicated_shards,
    lora,
    unseen_function,
    routed_rows,
    positions_by_row,
]


PRECISIONS = [mixed_precision, unseen_in_half_precision]
