"""How the Fisher kernels' work is cut up, and the sweep over tiles.

Kernels run on a GPU, or in the interpreter in a process of their own, as in ``triton_cases.py``.
"""

from __future__ import annotations

from functools import partial

import interpreter
import pytest

triton = pytest.importorskip("triton")
torch = pytest.importorskip("torch")

from benchmarks import gpu_report, kernels, tiles  # noqa: E402
from wplfast.backends import reference  # noqa: E402
from wplfast.backends.triton import fisher_config, fisher_linear, fisher_plan, launch  # noqa: E402
from wplfast.backends.triton.fisher_config import MAX_PARTIALS, Operands, Tile  # noqa: E402
from wplfast.backends.triton.fisher_plan import Layer, Plan, n_tiles  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu"
RUNS_HERE = DEVICE == "cuda" or launch.INTERPRETED
on_device = pytest.mark.skipif(not RUNS_HERE, reason="test_under_interpreter runs it")
HALF = Operands(1, torch.bfloat16)
KINDS = {
    "bf16": HALF,
    "fp32 as bf16x6": Operands(3, torch.bfloat16),
    "tf32": Operands(1, torch.float32, "tf32"),
    "ieee": Operands(1, torch.float32, "ieee"),
}


@pytest.mark.slow
@pytest.mark.skipif(RUNS_HERE, reason="the tests below run in this process")
def test_under_interpreter() -> None:
    interpreter.run(__file__)


def plan(monkeypatch: pytest.MonkeyPatch, layer: Layer, operands: Operands = HALF, capability: int = 90) -> Plan:
    """Return the plan of a GPU with 132 multiprocessors."""
    monkeypatch.setattr(fisher_plan, "generation", lambda device: fisher_config.rows_of(capability))
    monkeypatch.setattr(fisher_plan, "n_processors", lambda device: 132)
    return fisher_plan.choose_plan.__wrapped__(torch.device("cpu"), operands, layer, False)


@pytest.mark.parametrize(
    ("layer", "tile", "whole", "splits"),
    [
        (Layer(3072, 768, 8, 512), (128, 128), 132, 8),  # 144 tiles: 9 samples' time instead of 12 at two splits
        (Layer(4096, 4096, 8, 512), (128, 128), 1024, 1),
        (Layer(768, 768, 8, 512), (128, 128), 0, 3),  # 36 tiles
        (Layer(64, 4096, 32, 128), (64, 128), 0, 4),
        (Layer(4096, 64, 32, 128), (128, 64), 0, 4),
        (Layer(256, 64, 64, 3136), (128, 64), 0, 64),
    ],
)
def test_plans(layer: Layer, tile: tuple[int, int], whole: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = plan(monkeypatch, layer)
    assert ((chosen.tile.m, chosen.tile.n), chosen.whole, chosen.splits) == (tile, whole, splits)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("operands", KINDS.values(), ids=KINDS.keys())
def test_plans_keep_their_limits(operands: Operands, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for d_out in (1, 70, 768, 5000):
        for d_in in (8, 129, 3072):
            for n, t in ((1, 1), (8, 512), (300, 35)):
                layer = Layer(d_out, d_in, n, t, in_place=d_in % 8 == 0)
                chosen = plan(monkeypatch, layer, operands, capability)
                tiles_ = n_tiles(chosen.tile, layer)
                shared = 4 * chosen.tile.m * chosen.tile.n * (tiles_ - chosen.whole) * chosen.splits
                assert 0 <= chosen.whole <= tiles_
                assert chosen.whole == 0 or layer.in_place
                assert 1 <= chosen.splits <= n
                assert chosen.splits == 1 or shared <= MAX_PARTIALS
                assert chosen.tile.k <= max(16, triton.next_power_of_2(t))


def test_consumer_blackwell_takes_tiles_that_fit_its_shared_memory() -> None:
    assert [fisher_config.rows_of(c) for c in (75, 80, 89, 90, 100, 103, 110, 120, 121)] == [
        8, 8, 8, 9, 10, 10, 10, 8, 8,
    ]  # fmt: skip


@on_device
@pytest.mark.parametrize("d_in", [72, 77])
@pytest.mark.parametrize("t", [9, 40])
@pytest.mark.parametrize("gradient", [False, True])
def test_tiles_of_their_own_and_shared_ones(gradient: bool, t: int, d_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    n, d_out = 5, 136
    g, a = (torch.randn(n, t, d, device=DEVICE).half() for d in (d_out, d_in))
    weights = torch.rand(n, device=DEVICE)
    start = torch.rand(2, d_out, d_in)
    expected = [x.double().to(DEVICE) for x in start]
    reference.fisher_linear_(expected[0], a.double(), g.double(), weights.double(), expected[1] if gradient else None)
    tile = Tile(64, 64, 16, 4, 2, 1)  # 3 x 2 tiles
    cuts = [(4, 3), (0, 2), (0, 1), (6, 1)] if d_in % 8 == 0 else [(0, 2), (0, 1)]
    monkeypatch.setattr(fisher_linear, "MAX_PARTIALS", 1 << 17)  # at most 8 partial tiles: several launches
    for whole, splits in cuts:
        fisher, mean = (x.clone().to(DEVICE) for x in start)
        tiles.under(Plan(tile, whole, splits), [fisher], g, a, weights, mean if gradient else None)
        assert (fisher - expected[0]).norm() <= 1e-5 * expected[0].norm()
        assert (mean - expected[1]).norm() <= 1e-5 * expected[1].norm()


@on_device
@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "dtype"), [(kernels.Layer(2, 40, 136, 72), "bf16"), (kernels.Layer(2, 6, 72, 136), "fp32")]
)
def test_the_sweep_runs(layer: kernels.Layer, dtype: str) -> None:
    before, device = fisher_plan.choose_plan, torch.device(DEVICE)
    record = kernels.measure(partial(tiles.tiled, layer=layer, dtype=dtype), device, True)
    assert fisher_plan.choose_plan is before
    assert record["left_out"] == {}
    assert set(record["times"]) - {kernels.OURS, kernels.PLAIN, "copy"} == set(
        tiles.plans(layer, kernels.DTYPES[dtype], device)
    )
    assert len(record["times"]) == 3 + 4, "every row of the table"
    assert len(gpu_report.tiles({"a": record})) == 2 + len(record["times"])


@on_device
def test_wrong_tiles_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = kernels.Layer(2, 16, 64, 64)
    kernel = tiles.tiled(torch.Generator(DEVICE).manual_seed(0), layer, "bf16")
    kernel.variants = {
        "none": partial(tiles.under, object()),
        "wrong": lambda accumulators, g, a: accumulators[0].add_(1),
    }
    record = kernels.measure(lambda generator: kernel, torch.device(DEVICE), True)
    assert record["left_out"]["none"] == "AttributeError: 'object' object has no attribute 'tile'"
    assert record["left_out"]["wrong"].startswith("wrong:")
    assert set(record["times"]) == {kernels.OURS, kernels.PLAIN, "copy"}
