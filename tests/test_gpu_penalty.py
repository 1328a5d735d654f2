"""The penalty in training on the device: no waits, CUDA graphs, compiled steps, streams, threads, mixed precision."""

from __future__ import annotations

import gc

import pytest
import torch
from gpu_cases import (
    GPU,
    INTERPRETED,
    NAME,
    Graph,
    allocated,
    in_threads,
    needs_gpu,
    on_device,
    same_bits,
    size,
    without_waiting,
)
from gpu_cases import stream as new_stream
from penalty_cases import enter, expected, gradients, grads_of, move
from torch import nn

import wplfast

pytestmark = on_device


def penalised(count=2, dtype=torch.float32):
    """A module of odd sizes for inputs [N, 33], a penalty, and the anchors that the module moved away from."""
    module = nn.Sequential(
        nn.Linear(33, 65), nn.Tanh(), nn.Unflatten(1, (1, 65)), nn.Conv1d(1, 3, 5), nn.Flatten(), nn.Linear(183, 4)
    ).to(dtype)
    wpl = wplfast.WeightPlasticityLoss(module, alpha=3.0, l2=0.1)
    return module, wpl, [enter(wpl, module) for _ in range(count)]


def assert_right(value, found, module, wpl, anchors, factor=1.0):
    exact = expected(module, anchors, float(wpl.alpha), 0.1)
    assert abs(float(value) - float(exact)) <= 2e-6 * float(exact)
    for g, e in zip(found, gradients(module, exact).values(), strict=True):
        eps = torch.finfo(g.dtype).eps
        atol = 4e-6 if g.dtype == torch.float32 else 0.1
        torch.testing.assert_close(g.double(), factor * e.double(), rtol=4 * eps, atol=atol)


def zero_gradients(module):
    for p in module.parameters():
        p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steady_steps_do_not_wait_for_the_device(dtype):
    module, wpl, _ = penalised(dtype=dtype)
    parameters = list(module.parameters())
    handle = wpl.subset(["0.weight", "5.bias"])
    scale = torch.tensor(0.5, dtype=torch.float64)

    def steps():
        for p in parameters:
            p.grad = None
        wpl().backward()
        wpl.add_grad_()
        wpl.add_grad_(scale)
        handle.add_grad_()
        (2 * handle()).backward()
        torch.autograd.grad(wpl(), parameters)

    steps()
    with without_waiting():
        for _ in range(3):
            steps()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_add_grad_in_a_cuda_graph_sees_parameters_and_alpha_move(dtype):
    module, wpl, anchors = penalised(dtype=dtype)
    zero_gradients(module)
    graph = Graph(wpl.add_grad_)
    for alpha in (3.0, 1.5, 0.25):
        wpl.alpha = alpha
        move(module)
        for p in module.parameters():
            p.grad.zero_()
        value = graph.replay()
        assert_right(value, [p.grad for p in module.parameters()], module, wpl, anchors)


def test_the_autograd_path_in_a_cuda_graph():
    module, wpl, anchors = penalised()
    parameters = list(module.parameters())

    def step():
        value = wpl()
        return value.detach(), torch.autograd.grad(value, parameters)

    graph = Graph(step)
    for _ in range(3):
        move(module)
        value, gradients = graph.replay()
        assert_right(value, gradients, module, wpl, anchors)


def test_a_whole_training_step_in_a_cuda_graph():
    """Forward, backward, the penalty's gradient and the optimizer: replays do what eager steps do."""
    module, wpl, _ = penalised(count=1)
    x, y = torch.randn(8, 33), torch.randint(0, 4, (8,))
    state = {n: p.detach().clone() for n, p in module.named_parameters()}
    zero_gradients(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step():
        for p in module.parameters():
            p.grad.zero_()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        value = wpl.add_grad_()
        optimizer.step()
        return loss.detach(), value

    def restart():
        with torch.no_grad():
            for n, p in module.named_parameters():
                p.copy_(state[n])

    restart()
    eager = [[r.clone() for r in step()] for _ in range(4)]
    graph = Graph(step)
    restart()
    for wanted in eager:
        for one, other in zip(graph.replay(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_without_a_break(mode):
    if not GPU and mode == "reduce-overhead":
        pytest.skip("CUDA graphs need a GPU")
    module, wpl, anchors = penalised()
    parameters = list(module.parameters())
    backend = {} if GPU else {"backend": "aot_eager"}  # the inductor knows no rehearsal device
    options = {"mode": mode} if GPU else {}
    value_of = torch.compile(lambda: wpl() * 2, fullgraph=True, **options, **backend)
    for alpha in (3.0, 1.25, 0.5, 2.0):
        wpl.alpha = alpha
        move(module)
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        value = value_of()
        gradients = [g.clone() for g in torch.autograd.grad(value, parameters)]
        assert_right(float(value) / 2, gradients, module, wpl, anchors, factor=2.0)


def test_compiled_add_grad():
    module, wpl, anchors = penalised()
    zero_gradients(module)
    add = torch.compile(wpl.add_grad_, **({} if GPU else {"backend": "aot_eager"}))
    for _ in range(3):
        move(module)
        for p in module.parameters():
            p.grad.zero_()
        assert_right(add(), [p.grad for p in module.parameters()], module, wpl, anchors)


def test_streams_of_ones_own():
    """Tables are made on one stream and read on others."""
    module, wpl, _ = penalised()
    first = grads_of(wpl, module)
    for _ in range(5):
        with new_stream():
            again = grads_of(wpl, module)
            value = wpl.add_grad_(active=["0.bias", "3.weight"])
        assert same_bits(again, first)
        assert value.isfinite()


def test_a_penalty_made_on_another_stream():
    for _ in range(5):
        with new_stream():
            module, wpl, anchors = penalised()
            value = wpl()
        assert_right(value, grads_of(wpl, module), module, wpl, anchors)


def test_threads_on_one_penalty_and_on_their_own():
    module, wpl, _ = penalised()
    parameters = list(module.parameters())
    first = torch.autograd.grad(wpl(), parameters)

    def shared():
        for _ in range(20):
            assert same_bits(torch.autograd.grad(wpl(), parameters), first)

    def own():
        mine, penalty, entered = penalised()
        for _ in range(5):
            value = penalty()
            assert_right(value, grads_of(penalty, mine), mine, penalty, entered)

    in_threads(shared, own, shared, own)


@pytest.mark.skipif(INTERPRETED or NAME == "rehearsal", reason="loss scaling is of a GPU's")
def test_with_autocast_and_a_gradient_scaler():
    module, wpl, anchors = penalised(count=1)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.randn(8, 33), torch.randint(0, 4, (8,))
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(module(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = [p.grad.clone() for p in module.parameters()]
        value = wpl.add_grad_()
        added = [p.grad - b for p, b in zip(module.parameters(), before, strict=True)]
        exact = expected(module, anchors, 3.0, 0.1)
        assert abs(float(value) - float(exact)) <= 2e-6 * float(exact)
        for g, e in zip(added, gradients(module, exact).values(), strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)
        scaler.step(optimizer)
        scaler.update()


def test_under_autocast_the_penalty_stays_wide():
    module, wpl, anchors = penalised()
    kind = "cpu" if NAME == "cpu" else NAME
    outside = wpl()
    with torch.autocast(kind, dtype=torch.bfloat16):
        inside = wpl()
        gradients = torch.autograd.grad(inside, list(module.parameters()))
    assert inside.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert_right(inside, gradients, module, wpl, anchors)


def test_parameters_on_two_devices_add_up_or_are_refused(device):
    if device.type == "cpu":
        pytest.skip("the interpreter's tensors are all on the CPU")
    here, there = torch.ones(5, requires_grad=True), torch.ones(3, requires_grad=True, device="cpu")
    wpl = wplfast.WeightPlasticityLoss({"here": here, "there": there}, alpha=2.0)
    wpl.consolidate({"here": torch.ones(5), "there": torch.full((3,), 2.0, device="cpu")})
    with torch.no_grad():
        here.add_(1), there.add_(1)
    value = wpl()
    value.backward()
    assert value.item() == 5 + 2 * 3
    assert here.grad.tolist() == [2.0] * 5
    assert there.grad.tolist() == [4.0] * 3
    assert wpl.add_grad_().item() == 11
    zeros, ones = torch.zeros(5, device="cpu"), torch.ones(5, device="cpu")
    with pytest.raises(ValueError, match=r"must .*got .*cpu"):
        wplfast.functional.wpl_penalty([here], [zeros], [ones], 1.0)


def test_a_fisher_from_the_cpu_is_taken_and_moved_back():
    module, wpl, _ = penalised(count=0)
    wpl.consolidate({n: torch.ones(p.shape, device="cpu") for n, p in module.named_parameters()})
    move(module)
    value = wpl().item()
    module.cpu()
    if NAME == "rehearsal":  # there the parameters are replaced, on a GPU they stay the same objects
        wpl.rebind(module)
    assert wpl().item() == pytest.approx(value, rel=1e-5)
    if NAME != "cpu":
        module.to(NAME)
    if NAME == "rehearsal":
        wpl.rebind(module)
    assert wpl().item() == pytest.approx(value, rel=1e-6)


@pytest.mark.alone
def test_nothing_leaks_over_many_iterations():
    module, wpl, _ = penalised()
    names = [n for n, _ in module.named_parameters()]

    def step(k):
        for p in module.parameters():
            p.grad = None
        wpl().backward()
        wpl.add_grad_()
        wpl(active=names[k % 3 :]).backward()
        torch.autograd.grad(wpl(), list(module.parameters()), create_graph=True)

    for k in range(12):
        step(k)
    gc.collect()
    before = allocated()
    for k in range(size(200, 40)):
        step(k)
    gc.collect()
    assert allocated() <= before + 4096


@needs_gpu
@pytest.mark.alone
def test_pinned_memory_stays_bounded():
    """Gradients that move every step make new tables, whose pinned sources must not pile up."""
    module, wpl, _ = penalised()
    used = lambda: torch.cuda.host_memory_stats()["allocated_bytes.current"]  # noqa: E731
    kept = []

    def step():
        zero_gradients(module)
        kept.append([p.grad for p in module.parameters()])
        wpl.add_grad_()

    for _ in range(10):
        step()
    torch.cuda.synchronize()
    before = used()
    for _ in range(200):
        step()
    torch.cuda.synchronize()
    assert used() <= before + 65536
