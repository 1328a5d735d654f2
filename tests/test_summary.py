"""``Fisher.summary`` and ``Fisher.plot``: numbers computed by hand, and pictures whose parts say what they must."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from wplfast import Fisher
from wplfast.fisher import plot_rows
from wplfast.fisher.spread import Spread, module_of
from wplfast.fisher.table import shortened, table


def fisher() -> Fisher:
    """Three modules and a parameter outside of any: trace 10."""
    return Fisher(
        {
            "body.0.weight": torch.tensor([[1.0, 0.0], [3.0, 0.0]]),
            "body.0.bias": torch.tensor([0.5]),
            "body.1.weight": torch.tensor([0.25, 0.25], dtype=torch.bfloat16),
            "head.weight": torch.tensor([5.0], dtype=torch.float64),
            "scale": torch.zeros(()),
        },
        1234,
    )


def test_a_row_for_each_module() -> None:
    rows = {row.module: row for row in fisher().summary()}
    assert list(rows) == ["body.0", "body.1", "head", "scale"]
    first = rows["body.0"]
    assert (first.tensors, first.elements, first.mean, first.share, first.largest) == (2, 5, 0.9, 0.45, 3.0)
    assert [rows[name].share for name in ("body.1", "head", "scale")] == [0.05, 0.5, 0.0]
    total = fisher().summary().total
    assert (total.tensors, total.elements, total.share, total.largest) == (5, 9, 1.0, 5.0)


@pytest.mark.parametrize(
    ("depth", "modules"), [(0, [""]), (1, ["body", "head", "scale"]), (2, ["body.0", "body.1", "head", "scale"])]
)
def test_depth_joins_modules(depth: int, modules: list[str]) -> None:
    summary = fisher().summary(depth)
    assert [row.module for row in summary] == modules
    assert sum(row.share for row in summary) == pytest.approx(1)
    assert sum(row.elements for row in summary) == 9


def test_depth_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="depth must not be negative, got -1"):
        fisher().summary(-1)


def test_it_prints_as_a_table_and_as_html() -> None:
    summary = fisher().summary(1)
    lines = str(summary).splitlines()
    assert lines[0].split() == ["module", "tensors", "elements", "mean", "share", "of", "trace", "largest"]
    assert lines[1].split() == ["body", "3", "7", "7.14e-01", "50.00", "%", "3.00e+00"]
    assert lines[-1] == "1,234 samples"
    assert len({len(line) for line in lines[:-1]}) == 1  # the last column is aligned
    page = Fisher({"a<b.weight": torch.ones(2)}, 3).summary()._repr_html_()
    assert "<td" in page
    assert "a&lt;b" in page
    assert "a<b" not in page


def test_it_is_data() -> None:
    summary = fisher().summary()
    assert len(summary[1:3]) == 2
    plain = json.loads(json.dumps(summary.to_dict()))
    assert plain["modules"][2] == {
        "module": "head", "tensors": 1, "elements": 1, "mean": 5.0, "share": 0.5, "largest": 5.0,
    }  # fmt: skip
    empty = Fisher({"w": torch.zeros(0), "v": torch.zeros(2)}, 0).summary()
    assert math.isnan(empty[0].mean)
    assert empty.to_dict()["modules"][0]["mean"] is None
    assert "-" in str(empty).splitlines()[1]


def test_of_many_rows_the_largest_are_printed_and_the_others_summed() -> None:
    many = Fisher({f"m{i}.weight": torch.full((2,), float(i % 100)) for i in range(1000)}, 5).summary()
    lines = str(many).splitlines()
    assert len(lines) == 1 + 60 + 2
    assert lines[60].startswith("(941 others)")
    assert "1,882" in lines[60]
    shown = [int(line.split()[0][1:]) for line in lines[1:60]]
    assert shown == sorted(shown)  # in the model's order
    assert all(i % 100 >= 94 for i in shown)
    assert len(many) == 1000


def test_sums_are_in_float64() -> None:
    tensor = torch.full((3_000_001,), 1.0, dtype=torch.bfloat16)
    assert Fisher({"w": tensor}, 1).summary().total.mean == 1.0


def test_a_part_of_the_entries_has_all_columns() -> None:
    """The median of what is spread by columns: every 64th entry of rows of 64 would be one column's."""
    matrix = torch.arange(64.0).repeat(1024, 1)
    entries = Spread.of("weight", matrix, sampled=1024).entries
    assert entries is not None
    assert len(entries) <= 1024
    assert set(entries.tolist()) == set(range(64))
    assert abs(float(entries.median()) - 31.5) < 1


def test_tables_fit_a_terminal_and_keep_names_in_a_pipe() -> None:
    name = "a.very.long.name.of.a.parameter.that.goes.on.and.on"
    rows = [(name, "1"), ("b", "22")]
    assert name in table(("module", "n"), rows)
    narrow = table(("module", "n"), rows, width=24).splitlines()
    assert max(map(len, narrow)) == 24
    assert narrow[1].startswith("a.ver")
    assert narrow[1].endswith(" 1")
    assert shortened(name, 15) == "a.ve...n.and.on"
    assert len(shortened(name, 15)) == 15
    assert module_of("a.b.c", 1) == "a"
    assert module_of("c", 1) == "c"


# ---- pictures -------------------------------------------------------------------------------------------------------


def blocks(n: int, kinds: tuple[str, ...] = ("attn.q", "attn.k", "mlp.up", "mlp.down")) -> dict[str, torch.Tensor]:
    """Parameters of n blocks."""
    return {f"h.{i}.{kind}.weight": torch.full((4,), i + 1.0) for i in range(n) for kind in kinds}


def lines_of(tensors: dict[str, torch.Tensor]) -> plot_rows.Picture:
    return plot_rows.arranged([Spread.of(name, tensor) for name, tensor in tensors.items()])


def test_few_modules_have_a_line_each() -> None:
    picture = lines_of(dict(fisher()))
    assert [line.label for line in picture.lines] == ["body.0", "body.1", "head", "scale"]
    assert picture.columns == []
    line = picture.lines[0]
    assert line.quantiles() == (0.5, 0.5, 1.0, 3.0, 3.0)
    assert line.zeros() == pytest.approx(0.4)
    assert line.mean() == pytest.approx(1.5)
    assert picture.lines[3].quantiles() is None


def test_blocks_become_columns() -> None:
    tensors = {"wte.weight": torch.ones(3), **blocks(12), "ln_f.weight": torch.ones(2)}
    picture = lines_of(tensors)
    kinds = ["h.*.attn.q", "h.*.attn.k", "h.*.mlp.up", "h.*.mlp.down"]
    assert [line.label for line in picture.lines] == ["wte", *kinds, "ln_f"]
    assert picture.columns == list(range(12))
    assert [cell.mean for cell in picture.lines[1].cells.values()] == [i + 1.0 for i in range(12)]
    assert picture.lines[0].cells == {}
    assert sum(line.whole.total for line in picture.lines) == pytest.approx(picture.whole.total)


def test_experts_are_not_told_apart_and_what_is_in_one_block_has_one_cell() -> None:
    tensors = {f"h.{i}.experts.{e}.w.weight": torch.ones(2) for i in range(4) for e in range(20)}
    picture = lines_of(tensors | {"h.0.bias.weight": torch.ones(2)})
    assert [line.label for line in picture.lines] == ["h.*.experts.#.w", "h.*.bias"]
    assert list(picture.lines[1].cells) == [0]


@pytest.mark.parametrize("tensors", [
    {f"part{i}.w": torch.full((2,), float(i)) for i in range(200)},
    {f"part{i}.deep.{j}.w": torch.full((2,), float(i)) for i in range(100) for j in range(3)},
    blocks(3, tuple(f"kind{i}.part.w" for i in range(90))),
])  # fmt: skip
def test_there_are_never_too_many_lines(tensors: dict[str, torch.Tensor]) -> None:
    picture = lines_of(tensors)
    assert len(picture.lines) <= plot_rows.MOST
    assert sum(line.whole.elements for line in picture.lines) == sum(t.numel() for t in tensors.values())
    assert sum(line.whole.total for line in picture.lines) == pytest.approx(picture.whole.total)


@pytest.mark.parametrize("tensors", [
    dict(fisher()),
    {"wte.weight": torch.zeros(3), **blocks(12), "h.3.gate": torch.zeros(2)},
    {"w": torch.zeros(3)},
    {f"a_name_that_goes_on_and_on_and_on_and_on_and_on_{i}.w": torch.rand(3) for i in range(40)},
])  # fmt: skip
def test_texts_lie_within_the_picture_and_apart(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = Fisher(tensors, 7).plot(tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert figure.get_facecolor() == (1, 1, 1, 1)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    width, height = canvas.get_width_height()
    for axes in figure.axes:
        low, high = sorted(axes.get_ylim())
        drawn = [label for label in axes.get_yticklabels() if label.get_text() and label.get_visible()]
        labels = [label for label in drawn if low <= label.get_position()[1] <= high]
        boxes = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.y0)
        assert all(lower.y1 <= upper.y0 + 0.5 for lower, upper in itertools.pairwise(boxes))
        for text in [*labels, *axes.texts]:
            box = text.get_window_extent(renderer)
            assert box.x0 >= 0
            assert box.x1 <= width
            assert 0 <= box.y0 < box.y1 <= height, text.get_text()


def test_a_picture_says_what_holds_most(tmp_path: Path) -> None:
    figure = fisher().plot()
    said = [text.get_text() for text in figure.texts]
    assert "head holds 50.0 % of the trace, in 11.1 % of the elements" in said
    bars = [patch.get_width() for patch in figure.axes[0].containers[1].patches]
    assert bars == [0.45, 0.05, 0.5, 0.0]
    title = figure.get_suptitle()
    assert "9 elements in 5 tensors, 1,234 samples" in title


def test_what_cannot_be_drawn_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        Fisher({"w": torch.zeros(0)}, 0).plot()
    with pytest.raises(ValueError, match=r"fisher\['w'\] must be finite to be drawn, its sum is nan"):
        Fisher({"w": torch.tensor([math.nan])}, 1).plot()
    with pytest.raises(OSError, match="absent"):
        fisher().plot(tmp_path / "absent" / "f.png")
    with pytest.raises(ValueError, match="xyz"):
        fisher().plot(tmp_path / "f.xyz")
    missing: Any = None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", missing)
    with pytest.raises(ImportError, match=r'pip install "wplfast\[plot\]"'):
        fisher().plot()
