"""Merging the Fishers of several ranks."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import wplfast


def _rank(rank: int, path: str, results: str) -> None:
    """Compute one rank's part and merge."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    x, y = torch.randn(7, 4), torch.randint(0, 3, (7,))
    part = slice(0, 5) if rank == 0 else slice(5, 7)
    options = {"loss_fn": wplfast.losses.cross_entropy, "with_grad": True}
    fisher = wplfast.fisher_diagonal(model, [(x[part], y[part])], **options).all_reduce_()
    whole = wplfast.fisher_diagonal(model, [(x, y)], **options)
    torch.save((dict(fisher), dict(whole), fisher.n_samples, fisher.mean_grad, whole.mean_grad), f"{results}.{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo")
def test_all_reduce(tmp_path):
    mp.spawn(_rank, (str(tmp_path / "store"), str(tmp_path / "result")), nprocs=2)
    for rank in (0, 1):
        merged, whole, n_samples, gradient, of_whole = torch.load(tmp_path / f"result.{rank}")
        assert n_samples == 7
        for name, expected in whole.items():
            torch.testing.assert_close(merged[name], expected)
            torch.testing.assert_close(gradient[name], of_whole[name])
