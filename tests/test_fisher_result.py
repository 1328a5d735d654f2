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


def test_a_fisher_and_itself_do_not_add_up():
    fisher = wplfast.fisher_diagonal(mlp(), batches(), ce)
    with pytest.raises(ValueError, match="they hold the same samples, which would count twice"):
        fisher + fisher
    with pytest.raises(ValueError, match="count twice"):
        fisher += fisher
    assert sum([fisher]).n_samples == fisher.n_samples


def test_a_name_that_is_misspelt():
    fisher = wplfast.fisher_diagonal(mlp(), batches(), ce)
    with pytest.raises(KeyError, match=r"lacks 1 of 1 names: \['0.wieght'\]; .*did you mean '0.weight'\?"):
        fisher["0.wieght"]
    with pytest.raises(KeyError, match=r"^0$"):
        fisher[0]
    assert "0.wieght" not in fisher
    assert "0.weight" in fisher
    assert (fisher.get("0.wieght"), fisher.get("0.wieght", 3)) == (None, 3)
    assert fisher.get("0.weight") is fisher["0.weight"]


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


def known_report(**changes) -> wplfast.fisher.Report:
    found = {
        "rules": {"a": ("linear",), "b": ("generic", "scale")},
        "seconds": {"linear": 1.0, "generic": 2.0},
        "total_seconds": 4.0,
        "skipped_samples": 3,
        "numels": {"a": 2, "b": 2},
        "passes_per_batch": 2.0,
        "unchecked": ("statistics of the batch",),
    }
    return wplfast.fisher.Report(**(found | changes))


def reported(n_samples=1, metadata=None, **changes) -> wplfast.Fisher:
    tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    return wplfast.Fisher(tensors, n_samples, report=known_report(**changes), metadata=metadata)


def test_parts_and_other_names_keep_the_report():
    fisher = reported()
    assert fisher.select(["a", "b"]).report == fisher.report == fisher.to(torch.float64).report
    part = fisher.select(["b"]).rename(lambda name: f"m.{name}").report
    rest = {"rules": {"m.b": ("generic", "scale")}, "numels": {"m.b": 2}}
    assert part == known_report(**rest)
    assert part.slow == ("m.b",)


def test_a_sum_has_the_report_of_both():
    other = reported(
        3,
        rules={"a": ("embedding", "linear"), "b": ()},
        seconds={"linear": 1.0, "embedding": 5.0},
        passes_per_batch=1.0,
        unchecked=("a sampler", "statistics of the batch"),
    )
    assert (reported() + other).report == known_report(
        rules={"a": ("linear", "embedding"), "b": ("generic", "scale")},
        seconds={"linear": 2.0, "generic": 2.0, "embedding": 5.0},
        total_seconds=8.0,
        skipped_samples=6,
        passes_per_batch=1.25,
        unchecked=("statistics of the batch", "a sampler"),
    )
    unknown = wplfast.Fisher({"a": torch.ones(2), "b": torch.ones(2)}, 9)
    assert (reported() + unknown).report == (unknown + reported()).report == known_report()


def test_sum_of_a_list():
    parts = [reported(n) for n in (1, 2, 3)]
    found = sum(parts)
    assert (found.n_samples, found.report.skipped_samples) == (6, 9)
    assert sum(parts[:1]) is not parts[0]
    with pytest.raises(TypeError):
        1 + parts[0]


def test_a_sum_of_different_types_is_an_error_that_names_both():
    empirical, exact = (reported(metadata={"fisher_type": kind}) for kind in ("empirical", "exact"))
    with pytest.raises(ValueError, match="'empirical' in the first, 'exact' in the second"):
        empirical + exact
    with pytest.raises(ValueError, match="'exact' in the first, 'empirical' in the second"):
        exact + empirical
    assert (empirical + reported()).metadata == (reported() + empirical).metadata == empirical.metadata


def test_a_sum_says_where_both_come_from():
    first = {"source": "s", "data": "x.csv", "created": "2026-01-02", "provenance": "one", "partial": "1"}
    second = {"source": "s", "data": "y.csv", "created": "2026-01-01", "provenance": "two", "model": "m"}
    found = reported(metadata=first) + reported(metadata=second)
    assert found.metadata == {
        "source": "s",
        "data": "x.csv; y.csv",
        "created": "2026-01-02",
        "model": "m",
        "merged": '["one", "two"]',
    }
    again = found + reported(metadata={"data": "y.csv", "provenance": "three"})
    assert (again.metadata["data"], again.metadata["merged"]) == ("x.csv; y.csv", '["one", "two", "three"]')


def test_a_complex_mean_gradient_and_a_real_one_do_not_add_up():
    real, imaginary = (
        wplfast.Fisher({"a": torch.ones(2)}, 1, mean_grad={"a": x})
        for x in (torch.ones(2), torch.ones(2, dtype=torch.complex64))
    )
    for first, second in ((real, imaginary), (imaginary, real)):
        with pytest.raises(ValueError, match="complex in one"):
            first + second


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
