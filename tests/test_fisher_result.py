"""What a Fisher pass returns: merged, selected, renamed, moved, copied and saved; and the loss that is its own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from fisher_cases import batches, ce, mlp
from oracle import assert_close

import wplfast


def test_merging_by_sample_counts():
    model, data = mlp(torch.float64), batches((5, 3, 4), torch.float64)
    parts = [wplfast.fisher_diagonal(model, [b], ce, with_grad=True) for b in data]
    merged, whole = parts[0] + parts[1] + parts[2], wplfast.fisher_diagonal(model, data, ce, with_grad=True)
    assert merged.n_samples == 12
    assert_close(merged, dict(whole), 1e-12, 1e-12)
    torch.testing.assert_close(merged.mean_grad["0.weight"], whole.mean_grad["0.weight"])
    with pytest.raises(wplfast.errors.NameMismatchError):
        parts[0] + parts[1].rename(lambda n: "x." + n)


def test_select_rename_to_flat():
    fisher = wplfast.fisher_diagonal(mlp(), batches(), ce)
    assert list(fisher.select(["2.bias"])) == ["2.bias"]
    assert next(iter(fisher.rename(lambda n: f"m.{n}"))) == "m.0.weight"
    assert fisher.to(torch.float64)["2.bias"].dtype == torch.float64
    assert fisher.flat.shape == (6 * 9 + 9 + 9 * 4 + 4,)
    with pytest.raises(wplfast.errors.NameMismatchError, match="nope"):
        fisher.select(["nope"])
    with pytest.raises(ValueError, match="distinct"):
        fisher.rename(lambda n: "same")
    assert "12 samples" in repr(copy.deepcopy(pickle.loads(pickle.dumps(fisher))))


def test_files(tmp_path):
    fisher = wplfast.fisher_diagonal(mlp(), batches(), ce, with_grad=True)
    fisher.save(tmp_path / "f.safetensors")
    again = wplfast.Fisher.load(tmp_path / "f.safetensors")
    assert torch.equal(again.flat, fisher.flat.cpu())
    assert again.n_samples == 12
    assert torch.equal(again.mean_grad["2.bias"], fisher.mean_grad["2.bias"].cpu())
    assert again.metadata["fisher_type"] == "empirical"
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]
    (tmp_path / "cut").write_bytes((tmp_path / "f.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        wplfast.Fisher.load(tmp_path / "cut")


def test_cross_entropy():
    logits, targets = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    targets[0, :2] = -100
    targets[2] = -100
    nll = -logits.log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1) * (targets >= 0)
    torch.testing.assert_close(ce(logits, targets), nll.sum(1))
    expected = nll.sum(1) / torch.tensor([3, 5, 1])
    torch.testing.assert_close(ce(logits, targets, token_reduction="mean"), expected)
    torch.testing.assert_close(ce({"logits": logits}, targets, shift=True), ce(logits[:, :-1], targets[:, 1:]))
    with pytest.raises(ValueError, match="token_reduction"):
        ce(logits, targets, token_reduction="max")
    with pytest.raises(ValueError, match=r"targets of shape \[3, 5\]"):
        ce(logits, targets[:, :4])
    with pytest.raises(TypeError, match="logits"):
        ce(object(), targets)
