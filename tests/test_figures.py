"""The look of figures: smoothed curves, colours and lines, fonts, plain ticks, and the files that are written."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib import font_manager
from matplotlib.colors import to_rgb

from llmkit.run import drawing, figures


def test_smoothed_is_a_mean_of_neighbours() -> None:
    values = [math.sin(i) + i / 9 for i in range(40)]
    found = figures.smoothed(values, 3)
    for i, value in enumerate(found):
        before, after = min(3, i), min(3, i, 39 - i)
        part = values[i - before : i + after + 1]
        assert value == pytest.approx(sum(part) / len(part))
    assert found[0] == values[0]  # where a loss falls steeply
    assert figures.smoothed(values, 0) == pytest.approx(values)


def test_a_loss_curve(tmp_path: Path) -> None:
    """The mean of a long curve above the curve itself, units, and two files that are the same each time."""
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "epoch", "train_loss", "val_loss", "val_perplexity"])
        for step in range(0, 1200, 10):
            value = 2 + math.exp(-step / 200) + step % 7 / 50
            writer.writerow([step, 0, value, *((value, math.exp(value)) if step % 200 == 0 else ("", ""))])
    curves, unit = figures.losses(tmp_path / "metrics.csv")
    assert unit == "loss (nats per token)"
    axes = figures.curves_figure(curves, unit).axes[0]
    raw, mean, validation = axes.lines
    assert [line.get_label() for line in (mean, validation)] == ["training, mean of 5 points", "validation"]
    assert list(map(tuple, np.asarray(raw.get_xydata()))) == curves["training"]
    assert (raw.get_alpha(), raw.get_color()) == (0.3, mean.get_color())
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", unit)
    contents = []
    for name in ("a", "b"):
        figures.loss_curve(tmp_path / "metrics.csv", tmp_path / f"{name}.png")
        contents.append([(tmp_path / f"{name}.{kind}").read_bytes() for kind in ("png", "pdf")])
    assert contents[0] == contents[1]
    assert (contents[0][0][:4], contents[0][1][:5]) == (b"\x89PNG", b"%PDF-")
    broken = [(step, math.nan if step == 9 else 1.0) for step in range(200)]
    assert len(figures.curves_figure({"a": broken}, "loss").axes[0].lines) == 1  # no mean of what is not a number


def test_curves_can_be_told_apart() -> None:
    """By their colour or, in grey, by marker or line; neighbours by all three."""
    looks = [drawing.look(number) for number in range(24)]
    assert len({look[1:] for look in looks}) == 24
    assert len({(look[0], look[2]) for look in looks}) == 24
    assert all(one[place] != two[place] for one, two in itertools.pairwise(looks) for place in range(3))
    okabe_ito = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"}
    assert {look[0] for look in looks} == okabe_ito and all(map(to_rgb, okabe_ito))


def test_ticks_of_a_logarithmic_axis_are_plain_numbers(tmp_path: Path) -> None:
    with drawing.style():
        axes = drawing.canvas(3, 2).add_subplot()
        axes.plot([1e-4, 1e-1], [1, 2])
        drawing.plain_log(axes.xaxis, (1,))
        axes.figure.draw_without_rendering()
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert {"0.0001", "0.001", "0.01", "0.1"} <= set(shown)


def test_fonts_with_chinese(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is installed is used; otherwise a note says so, once."""
    names = ("DejaVu Sans", "SimHei", "Noto Sans CJK TC", "Noto Sans CJK JP")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [SimpleNamespace(name=name) for name in names])
    assert drawing.cjk_font.__wrapped__() == ["Noto Sans CJK JP"]
    monkeypatch.undo()
    monkeypatch.setattr(drawing, "cjk_font", list)
    drawing._note_missing.cache_clear()
    for _ in range(2):
        figures.confusion_matrix([[3, 1], [0, 2]], ["正面", "負面"], tmp_path / "a.png")
    assert capsys.readouterr().err.count("install Noto Sans CJK") == 1
