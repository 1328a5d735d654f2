"""Parameters whose gradients are of another dtype (``Tensor.grad_dtype`` of newer versions of PyTorch)."""

from __future__ import annotations

import pytest
import torch
from penalty_cases import anchored, trunk

import wplfast

pytestmark = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no grad_dtype")


def wide_gradients(dtype=torch.float32, gaps=False, frozen=()):
    """A bfloat16 module, and what the penalty's gradient is by autograd in the parameters' own dtype."""
    torch.manual_seed(0)
    module = trunk(torch.bfloat16)
    if gaps:
        module[0].weight.data = torch.zeros(7, 10, dtype=torch.bfloat16)[:, ::2].copy_(module[0].weight.data)
    wpl = anchored(module)
    for name in frozen:
        module.get_parameter(name).requires_grad_(False)
    trained = [p for p in module.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(wpl(), trained)
    for p in module.parameters():
        p.grad_dtype = dtype
    return module, wpl, [g.float() for g in wanted], trained


@pytest.mark.parametrize("present", [True, False], ids=["present", "missing"])
@pytest.mark.parametrize("gaps", [False, True], ids=["dense", "gaps"])
@pytest.mark.parametrize("how", ["add_grad_", "attach", "subset"])
def test_gradients_are_added_in_the_dtype_that_was_set(present, gaps, how):
    module, wpl, wanted, trained = wide_gradients(gaps=gaps, frozen=["2.bias"])
    for p in trained:
        p.grad = torch.full(p.shape, 1.0) if present else None
    if how == "attach":
        optimizer = torch.optim.SGD(trained, lr=0.0)
        wpl.attach(optimizer)
        optimizer.step()
    else:
        (wpl if how == "add_grad_" else wpl.subset(list(wpl.fisher))).add_grad_()
    for p, want in zip(trained, wanted, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, want + (1.0 if present else 0.0), rtol=1e-2, atol=1e-3)
    assert module[2].bias.grad is None


def test_what_is_there_keeps_its_precision():
    _, wpl, _, trained = wide_gradients()
    for p in trained:
        p.grad = torch.full(p.shape, 1.0 + 2**-20)
    wpl.add_grad_(0.0)
    assert all(bool((p.grad == 1.0 + 2**-20).all()) for p in trained)


def test_after_a_backward_pass_and_again():
    _, wpl, wanted, trained = wide_gradients()
    wpl().backward()
    for _ in range(2):
        wpl.add_grad_()
    for p, want in zip(trained, wanted, strict=True):
        assert p.grad.dtype == torch.float32
        torch.testing.assert_close(p.grad, 3 * want, rtol=1e-2, atol=1e-3)


def test_any_dtype_may_be_allowed():
    _, wpl, wanted, trained = wide_gradients(dtype=None)
    trained[0].grad = torch.zeros(trained[0].shape, dtype=torch.float64)
    wpl.add_grad_()
    assert [p.grad.dtype for p in trained] == [torch.float64, *[torch.bfloat16] * (len(trained) - 1)]
    torch.testing.assert_close(trained[0].grad.float(), wanted[0])


def test_another_dtype_stays_an_error_and_nothing_is_added():
    module = trunk()
    wpl, first, last = anchored(module), module[0].weight, module[3].weight
    first.grad = torch.zeros_like(first)
    last.grad_dtype = None
    last.grad = torch.zeros(last.shape, dtype=torch.float64)
    last.grad_dtype = torch.float64
    wpl.add_grad_()
    assert last.grad.dtype == torch.float64
    before = first.grad.clone()
    last.grad = None
    last.grad_dtype = None
    last.grad = torch.zeros(last.shape, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"\.grad must be dense and torch.float32\[2, 2\]"):
        wpl.add_grad_()
    assert torch.equal(first.grad, before)


def test_some_of_the_parameters_alone():
    w, v = (torch.randn(5, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    w.grad_dtype = torch.float32
    wpl = wplfast.WeightPlasticityLoss({"w": w, "v": v})
    wpl.consolidate({"w": torch.ones(5), "v": torch.ones(5)}, theta_hat={"w": w.detach() - 1, "v": v.detach() - 1})
    v.grad = torch.zeros_like(v)
    wpl.add_grad_()
    assert (w.grad.dtype, v.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(w.grad, torch.ones(5), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(v.grad, torch.ones_like(v), rtol=2e-2, atol=2e-2)
