"""Figures of the instruments show the numbers that they were given."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure

from lightning_difftune.plots import LINES, bars, forgetting_figure, ideal_distances, swap_figure


def test_the_swap_figure_has_a_curve_and_a_strip_for_each_model():
    series = {"full": {0: 9.0, 50: 4.0, 100: 30.0}, "difftune": {0: 3.0, 50: 3.5, 100: 30.0}}
    strips = {name: torch.randint(0, 256, (3, 2, 1, 4, 5), dtype=torch.uint8) for name in series}
    figure = swap_figure(series, strips, "distance")
    curve, *panels = figure.axes
    assert [list(line.get_ydata()) for line in curve.lines[::2]] == [[9, 4, 30], [3, 3.5, 30]]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in curve.lines[1::2]] == [(50, 4), (0, 3)]  # the stars
    assert curve.get_ylabel() == "distance"
    for panel, (name, strip) in zip(panels, strips.items(), strict=True):
        canvas = torch.from_numpy(panel.images[0].get_array().data)[..., 0]
        assert canvas.shape == (2 * 4, 3 * 5)  # a row for each sample, a column for each percent
        assert torch.equal(canvas[4:, 5:10], strip[1, 1, 0])
        assert panel.get_title(loc="left") == name
        assert [label.get_text() for label in panel.get_xticklabels()] == ["0", "50", "100"]


@pytest.mark.parametrize("steps", [[0], [0, 100, 150]])
def test_the_heat_maps_show_doubled_losses_as_one(steps):
    history = [(step, {"target": [1.0, 2.0], "bank": [0.5, 8.0]}) for step in steps]
    figure = forgetting_figure(history, {"target": [2.0, 2.0], "bank": [0.5, 1.0]}, [0, 500, 1000])
    maps = [axes.collections[0] for axes in figure.axes[:2]]
    for mesh, (low, high) in zip(maps, [(-1, 0), (0, 3)], strict=True):
        assert mesh.get_array().reshape(2, len(steps)).tolist() == [[low] * len(steps), [high] * len(steps)]


def test_labels_of_bars_stand_upright_where_they_would_overlap():
    few, many = Figure((14, 4)).subplots(1, 2)
    bars(few, ["a", "b"], {"one": [[1], [2]], "two": [[3, 5], []]}, "", "")
    bars(many, ["a", "b"] * 9, {"": [[0.000712], [18_499]] * 9}, "", "")
    assert [(text.get_text(), text.get_rotation()) for text in few.texts] == [("1.00", 0), ("2.00", 0), ("4.00", 0)]
    assert {(text.get_text(), text.get_rotation()) for text in many.texts} == {("0.000712", 90), ("18,499", 90)}
    many.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in many.texts]
    assert not any(a.overlaps(b) for a, b in pairwise(boxes))


def test_labels_of_bars_stand_outside_of_them():
    axes = Figure((4, 4)).subplots()
    bars(axes, ["a", "b"], {"": [[0.3, 0.5], [-0.3, -0.5]]}, "", "")
    axes.figure.canvas.draw()
    above, below = (axes.transData.inverted().transform(text.get_window_extent()) for text in axes.texts)
    assert above[0][1] > 0.5
    assert below[1][1] < -0.5


def test_distances_to_the_ideal_denoisers_are_curves_over_t():
    axes = Figure().subplots()
    ideal_distances(axes, {"of the source": [(0, 0.1), (500, 0.3)], "of the target": [(0, 0.2), (500, 0.4)]}, "model")
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.3], [0.2, 0.4]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["of the source", "of the target"]


def test_no_two_of_a_dozen_series_look_alike() -> None:
    assert len(LINES) >= 12
    for key in ("color", "linestyle", "marker"):
        assert len({style[key] for style in LINES}) == len(LINES), key
