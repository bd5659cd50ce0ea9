"""lora.png: what stands on a curve, in its legend, and in a cell."""

import itertools
import math

import pytest
from matplotlib.figure import Figure

from inspect_lora.elsewhere import Shift
from inspect_lora.parts import Part
from inspect_lora.picture import draw_gain_and_change, draw_losses, draw_parts, draw_updates
from inspect_lora.scores import Estimate


@pytest.fixture
def axes():
    return Figure(layout="constrained").subplots()


def key_of(axes):
    """Return the legend's texts, each of which must be of something that is drawn."""
    assert len(axes.get_legend().get_texts()) == len(axes.lines)
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_held_out_losses_are_dots_and_their_numbers_stand_in_the_legend(axes):
    draw_losses(axes, {step: 4 - step / 100 for step in range(1, 101)}, {0: 3.9, 100: 3.04})
    assert key_of(axes) == [
        "training, as logged", "training, mean of the last 10", "held-out: 3.900, 3.040",
    ]  # fmt: skip
    assert not axes.texts and axes.lines[-1].get_linestyle() == "None"


@pytest.mark.parametrize("steps", [1, 3])
def test_of_a_run_of_few_steps_nothing_is_averaged_and_one_step_is_seen(axes, steps):
    draw_losses(axes, {step: 4.0 for step in range(1, steps + 1)}, {})
    assert key_of(axes) == ["training, as logged"]
    assert (axes.lines[0].get_marker() == "o") == (steps == 1)
    assert all(tick == int(tick) for tick in axes.get_xticks())


def test_of_many_epochs_the_first_the_best_and_the_last_are_named(axes):
    draw_losses(axes, {1: 4.0}, {step: 4 + abs(step - 3) / 10 for step in range(6)})
    assert key_of(axes)[-1] == "held-out: 4.300 at first, 4.000 at best, 4.200 at last"


def rows(*updates):
    """Return a target's rows, one for each (layer, update)."""
    return [{"layer": layer, "update": update} for layer, update in updates]


def test_experts_share_a_cell_and_what_is_in_no_layer_is_named_below(axes):
    updates = {
        "q_proj": rows((0, 0.01), (1, 0.02)),
        "w1": rows((1, 0.03), (1, 0.05)),
        "lm_head": rows((None, 0.012)),
    }
    draw_updates(axes, 2, updates)
    (image,) = axes.images
    assert image.get_array().filled(math.nan).tolist() == [
        [1.0, 2.0], [pytest.approx(math.nan, nan_ok=True), 4.0],
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "w1"]
    assert axes.get_xlabel() == "layer (hatched: nothing trained); lm_head 1.2 %"


def test_an_adapter_of_the_head_alone_has_no_map(axes):
    draw_updates(axes, 2, {"lm_head": rows((None, 0.012))})
    assert not axes.images and axes.get_xlabel() == "lm_head 1.2 %"


@pytest.mark.parametrize("update", [0.0, 3e-9, 0.02])
def test_the_colours_fit_updates_of_any_size(axes, update, tmp_path):
    """A scale that begins and ends at 0 would be none."""
    draw_updates(axes, 40, {"q_proj": rows(*((layer, update) for layer in range(40)))})
    axes.figure.savefig(tmp_path / "picture.png")
    (image,) = axes.images
    assert image.norm.vmin == 0 and image.norm.vmax == pytest.approx(100 * update or 1)
    assert len(axes.get_xticks()) == 20
    for drawn in axes.figure.axes:  # the map, and the scale of its colours
        ends = [(label.get_window_extent().x0, label.get_window_extent().x1)
                for label in drawn.get_xticklabels() if label.get_text()]  # fmt: skip
        assert all(end < start for (_, end), (start, _) in itertools.pairwise(ends))


def test_one_large_update_leaves_the_others_a_difference(axes):
    draw_updates(axes, 40, {"q_proj": rows((0, 1.0), *((n, 0.01 + n / 1e4) for n in range(1, 40)))})
    (image,) = axes.images
    assert image.norm.vmax < 2
    assert any("the largest is 100 %" in one.get_xlabel() for one in axes.figure.axes)


def test_a_change_of_rounding_size_is_drawn_as_0(axes):
    """KL cannot be below 0, and its scale must not be of what float32 rounds."""
    parts = [
        Part("strength", value, "", change_model=None, of_gain=Estimate(value, 0.1), losses=[1.0])
        for value in (0.5, 2.0)
    ]
    draw_gain_and_change(axes, parts, {0.5: Shift([-5e-9], [0], [1]), 2.0: Shift([5e-9], [0], [1])})
    (_, right) = axes.figure.axes
    assert list(right.lines[0].get_ydata()) == [0.0, 0.0, pytest.approx(5e-9)]
    assert right.get_ylim() == (0, 0.001)
    draw_gain_and_change(axes, parts, {0.5: Shift([0.2], [0], [1]), 2.0: Shift([0.9], [0], [1])})
    assert axes.figure.axes[-1].get_ylim()[1] == pytest.approx(0.9, rel=0.1)


def some_part(kind, value):
    """Return a part that was measured on one reply."""
    share = Estimate(float(value), 0.1)
    return Part(kind, value, str(value), change_model=None, of_gain=share, losses=[1.0])


def some_parts():
    """Return the parts of two strengths and the whole."""
    return [some_part("strength", 0.5), some_part("whole", 1.0), some_part("strength", 2.0)]


def draw_strengths(axes):
    """Draw some_parts() by strength."""
    shifts = {part.value: Shift([0.2], [0], [1]) for part in some_parts()}
    draw_gain_and_change(axes, some_parts(), shifts)


def test_the_strength_as_trained_is_marked(axes):
    draw_strengths(axes)
    assert [1, 1] in [list(line.get_xdata()) for line in axes.lines]


def test_error_bars_and_lines_of_reference_look_alike_in_both_panels(axes):
    draw_strengths(axes)
    beside = Figure().subplots()
    draw_parts(beside, [some_part("cut", 4)])
    for lines_of in (caps, references):
        here, there = lines_of(axes), lines_of(beside)
        assert here and here == there


def caps(axes):
    """Return the sizes of the ends of error bars."""
    return {line.get_markersize() for line in axes.lines if line.get_marker() in ("_", "|")}


def references(axes):
    """Return the widths of the lines that go through the whole panel."""
    return {line.get_linewidth() for line in axes.lines if line.get_linestyle() in (":", "--")}
