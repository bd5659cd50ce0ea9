"""`losses`: what is drawn of runs, finished or not, is what their run.json has."""

import numpy as np
import pytest
from runs import command, read_json

from inspect_lora.__main__ import main


@pytest.fixture
def drawn(monkeypatch, capfd, real_picture):
    """Return drawn(folder, ...): the curves of the picture, by their names, as pairs of x and y."""

    def draw(*folders):
        figures = []
        save = lambda figure, _: figures.append(figure)  # noqa: E731
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)
        assert command(capfd, ["losses", *folders], main).status == 0
        return {
            line.get_label(): [*map(list, line.get_data())] for line in figures[0].axes[0].lines
        }

    return draw


def test_curves_are_those_of_the_records(drawn, finished, stopped):
    curves = drawn(finished.output, stopped.output)
    for run in (finished, stopped):
        folder = str(run.output)
        paths = [*run.output.glob("checkpoints/*/*/run.json"), run.output / "run.json"]
        newest = max(paths, key=lambda path: path.stat().st_mtime)
        history = read_json(newest)["loss_history"]
        held_out = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
        assert curves[f"{folder}, held out"] == [[*held_out], [*held_out.values()]]
        assert curves[f"{folder}, the base"][1] == [held_out[0]] * 2
        losses = [row["loss"] for row in history if "loss" in row]
        steps, smooth = curves[folder]
        assert steps == [*range(1, len(losses) + 1)] and len(losses) >= 6
        weights = 0.9 ** np.arange(len(losses))[::-1]
        assert smooth[-1] == pytest.approx(np.average(losses, weights=weights))
