"""Fisher passes on the device: waits for it, memory, repeatable bits, precision of real layers, threads, data."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from fisher_cases import MODELS, Decoder, ce, cnn, whole
from gpu_cases import GPU, NAME, allocated, in_threads, on_device, peak_of, poison, relative_error, size
from gpu_cases import stream as new_stream
from oracle import fisher_loop
from torch import nn

import wplfast

pytestmark = on_device


# That Fishers are right is tested in test_fisher.py, on the device too.
@pytest.mark.parametrize("name", MODELS)
def test_the_same_bits_run_to_run_and_on_another_stream(name):
    """Where torch's own backward pass repeats, so does F."""
    build, make = MODELS[name]
    model, data = build().eval(), [make(n) for n in (8, 5)]

    def gradients():
        model.zero_grad()
        ce(model(data[0][0]), data[0][1]).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    repeats = all(torch.equal(gradients(), gradients()) for _ in range(3))
    first = wplfast.fisher_diagonal(model, data, ce).flat
    for _ in range(3):
        poison()
        again = wplfast.fisher_diagonal(model, data, ce).flat
        assert torch.equal(again, first) if repeats else relative_error(again, first) < 1e-5
    with new_stream():
        again = wplfast.fisher_diagonal(model, data, ce).flat
    assert torch.equal(again, first) if repeats else relative_error(again, first) < 1e-5


READS = pytest.mark.not_rehearsed("Triton's embeddings: plain PyTorch's look at the indices")


@pytest.mark.parametrize("name", ["mlp", "cnn", pytest.param("decoder", marks=READS)])
def test_a_steady_batch_reads_the_device_once_for_the_losses_and_once_for_the_gradients(name, device):
    """What the host must know: are the losses finite, are the gradients; nothing else makes it wait."""
    build, make = MODELS[name]
    model, (x, y) = build().eval(), make(8)
    with wplfast.FisherAccumulator(model) as acc:
        for _ in range(4):
            acc.backward(ce(model(x), y))
        losses = ce(model(x), y)
        assert waits_of(lambda: acc.backward(losses), device) <= 2


def waits_of(function, device):
    """Count how often the host waits for the device."""
    if NAME == "rehearsal":
        before = torch.ops.rehearsal.waits()
        function()
        return torch.ops.rehearsal.waits() - before
    if not GPU:
        function()
        return 0
    import warnings

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


@pytest.mark.alone
@pytest.mark.parametrize("name", ["mlp", "cnn", "decoder"])
def test_peak_memory_is_that_of_a_unit_and_one_fisher(name):
    """A unit is forward and backward of the same batch; parameters used more than once may cost output gradients."""
    n = size(64, 8)
    build, make = {
        "mlp": (
            lambda: nn.Sequential(nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2048)),
            None,
        ),
        "cnn": (cnn, lambda: (torch.randn(n, 3, 64, 64), torch.randint(0, 10, (n,)))),
        "decoder": (lambda: Decoder(1000, 256, 4), lambda: (torch.randint(0, 1000, (n, 64)),) * 2),
    }[name]
    model = build().eval()
    x, y = make() if make else (torch.randn(n, 784), torch.randint(0, 2048, (n,)))

    def unit():
        for p in model.parameters():
            p.grad = None
        ce(model(x), y).sum().backward()

    unit()
    ordinary = peak_of(unit)
    for p in model.parameters():
        p.grad = None
    one_fisher = 4 * sum(p.numel() for p in model.parameters())
    tied = 0
    if name == "decoder":  # its table is the head, too: gradients of the logits and of the embeddings are kept
        tied = 4 * x.numel() * (1000 + 256)
    with wplfast.FisherAccumulator(model) as acc:
        for _ in range(3):
            acc.backward(ce(model(x), y))
        peak = peak_of(lambda: acc.backward(ce(model(x), y)))
    print(f"{name}: {peak / 2**20:.1f} MiB against {ordinary / 2**20:.1f} of a unit, F {one_fisher / 2**20:.1f}")
    if NAME != "rehearsal":  # the plain-PyTorch backend makes per-sample gradients, and is what a rehearsal runs
        assert peak <= 1.02 * ordinary + one_fisher + tied + 2**20


def test_data_from_the_cpu_and_from_a_loader(device):
    model = MODELS["mlp"][0]()
    x, y = torch.randn(20, 300, device="cpu"), torch.randint(0, 10, (20,), device="cpu")
    direct = wplfast.fisher_diagonal(model, [(x.to(device), y.to(device))], ce).flat
    assert torch.equal(wplfast.fisher_diagonal(model, [(x, y)], ce).flat, direct)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 8, pin_memory=GPU)
    several = wplfast.fisher_diagonal(model, loader, ce)
    assert several.n_samples == 20
    torch.testing.assert_close(several.flat, direct, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_the_default_device_may_be_the_cpu(name, device):
    """As it is where a model was moved: nothing of the library's own stays behind."""
    build, make = MODELS[name]
    model, data = build().eval(), [make(5), make(5), make(3)]
    expected = wplfast.fisher_diagonal(model, data, ce)
    torch.set_default_device("cpu")
    fisher = wplfast.fisher_diagonal(model, data, ce, with_grad=True)
    assert {t.device for t in (*fisher.values(), *fisher.mean_grad.values())} == {device}
    assert relative_error(fisher.flat, expected.flat) < 1e-5
    wplfast.fisher_diagonal(model, data, ce, max_samples=7, fisher_type="mc")
    wpl = wplfast.WeightPlasticityLoss(model, l2=0.1)
    wpl.consolidate(fisher, normalize="trace", clip_norm=5.0)
    wpl.consolidate(fisher, active=list(fisher)[1:])
    wpl.alpha = {"": 2.0}
    wpl().backward()
    added = [p.grad.clone() for p in model.parameters()]
    wpl.add_grad_()
    for p, once in zip(model.parameters(), added, strict=True):
        torch.testing.assert_close(p.grad, 2 * once)


@pytest.mark.parametrize("kind", ["empirical", "mc", "exact"])
def test_every_type_of_fisher(kind):
    build, make = MODELS["mlp"]
    model, data = build(), [make(6)]
    first = wplfast.fisher_diagonal(model, data, ce, fisher_type=kind, with_grad=True)
    again = wplfast.fisher_diagonal(model, data, ce, fisher_type=kind, with_grad=True)
    assert torch.equal(first.flat, again.flat)
    wide = copy.deepcopy(model).double()
    double = wplfast.fisher_diagonal(wide, [(data[0][0].double(), data[0][1])], ce, fisher_type=kind)
    if kind != "mc":  # another dtype may draw other targets
        assert relative_error(first.flat, double.flat) < 2e-6


def test_threads_with_models_of_their_own():
    build, make = MODELS["cnn"]

    def work():
        model, data = build().eval(), [make(4), make(3)]
        fisher = wplfast.fisher_diagonal(model, data, ce)
        exact = fisher_loop(model, data, ce)
        assert relative_error(whole(fisher[n] for n in exact), whole(exact.values())) < 1e-5

    in_threads(work, work, work)


@pytest.mark.alone
def test_nothing_is_left_on_the_device():
    build, make = MODELS["cnn"]
    model, data = build().eval(), [make(4)]
    wplfast.fisher_diagonal(model, data, ce)
    gc.collect()
    before = allocated()
    for _ in range(size(50, 5)):
        wplfast.fisher_diagonal(model, data, ce)
    gc.collect()
    assert allocated() <= before + 4096


def test_channels_last_and_the_penalty_after_it():
    build, make = MODELS["cnn"]
    model, (x, y) = build().eval(), make(6)
    expected = wplfast.fisher_diagonal(model, [(x, y)], ce)
    model = model.to(memory_format=torch.channels_last)
    fisher = wplfast.fisher_diagonal(model, [(x.to(memory_format=torch.channels_last), y)], ce)
    assert relative_error(fisher.flat, expected.flat) < 1e-5
    wpl = wplfast.WeightPlasticityLoss(model, alpha=2.0)
    wpl.consolidate(fisher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    value = wpl()
    exact = sum(f.double().sum() for f in fisher.values()) * 0.01**2
    assert value.item() == pytest.approx(float(exact), rel=1e-3)
    value.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 0.02 * fisher[n], rtol=1e-3, atol=1e-9)
