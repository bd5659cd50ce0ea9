"""Draws lora.png: the run's losses, the size of each update, the parts, and what else changed."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import transformers
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspect_lora.common import shorten_path
from inspect_lora.elsewhere import Shift
from inspect_lora.parts import Part
from inspect_lora.report import Findings, logged

BEHIND_A_NUMBER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}


def draw_picture(found: Findings, path: Path) -> bool:
    """Draw a panel for each thing that was measured; return whether there was any."""
    rows: list[list[str]] = []
    losses = logged(found.history, "loss")
    single = [part for part in found.parts if part.kind in ("group", "target", "cut")]
    if losses:
        rows.append(["losses", "losses"])
    if found.updates:
        rows.append(["updates", "updates"])
    if found.parts:
        rows.append(["strengths", "parts" if single else "strengths"])
    if found.parts and found.elsewhere:
        rows.append(["trade", "trade"])
    if not rows:
        return False
    figure = Figure((11, 1 + 3.2 * len(rows)), dpi=120, layout="constrained")
    panels = figure.subplot_mosaic(rows)
    config = found.adapter.model.peft_config["default"]
    figure.suptitle(
        f"{shorten_path(found.name, 50)} on {shorten_path(found.adapter.base, 40)}, "
        f"r = {config.r}, alpha = {config.lora_alpha}",
        parse_math=False,
    )
    if losses:
        draw_losses(panels["losses"], losses, logged(found.history, "eval_loss"))
    if found.updates:
        draw_updates(panels["updates"], found.adapter.model.config, found.updates)
    if found.parts:
        draw_strengths(panels["strengths"], found.parts)
    if single:
        draw_parts(panels["parts"], single)
    if found.parts and found.elsewhere:
        draw_gain_and_change(panels["trade"], found.parts, found.elsewhere.without_system)
    figure.savefig(path)
    return True


def draw_losses(axes: Axes, losses: dict[int, float], evals: dict[int, float]) -> None:
    """Draw each step's loss thinly, their running mean boldly, and the held-out losses."""
    steps, values = list(losses), list(losses.values())
    # The mean is over a thirtieth of a long run, and over up to ten steps of a short one.
    width = max(1, len(values) // 30, min(10, len(values) // 4))
    means = [statistics.fmean(values[max(0, n - width) : n]) for n in range(1, len(values) + 1)]
    axes.plot(steps, values, color="0.75", linewidth=0.7, label="training, each step")
    if width > 1:
        label = f"training, mean of {width} steps"
        axes.plot(steps, means, color="C0", linewidth=2, label=label)
    if evals:
        look = {"color": "black", "markeredgecolor": "white", "markersize": 9, "zorder": 5}
        axes.plot(list(evals), list(evals.values()), "o--", linewidth=0.8, label="held-out", **look)
    for step, loss in evals.items():
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            (0, 10),
            textcoords="offset points",
            ha="center",
            zorder=6,
            bbox=BEHIND_A_NUMBER,
        )
    axes.margins(y=0.15)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="Loss")
    axes.legend()


def draw_updates(
    axes: Axes, config: transformers.PretrainedConfig, updates: dict[str, list[dict[str, Any]]]
) -> None:
    """Draw the size of each module's update against its W, layers across and targets down."""
    text_config = config.get_text_config()
    layer_types = text_config.to_dict().get("layer_types") or []
    depth = text_config.num_hidden_layers
    sizes = [[math.nan] * depth for _ in updates]
    for number, rows in enumerate(updates.values()):
        for row in rows:
            if row["layer"] is not None:
                sizes[number][row["layer"]] = 100 * row["update"]
    image = axes.imshow(sizes, aspect="auto", vmin=0, cmap="viridis")
    axes.patch.set(hatch="xx", edgecolor="silver")  # shows through where there is no module
    axes.figure.colorbar(image, ax=axes, label="size of the update, % of W")
    marks = [str(number) for number in range(depth)]
    for number, layer_type in enumerate(layer_types):
        if layer_type == "linear_attention":
            marks[number] += "\nD"
    axes.set_xticks(range(depth), marks, fontsize=7)
    axes.set_yticks(range(len(sizes)), list(updates))
    note = " (D: Gated DeltaNet)" if "linear_attention" in layer_types else ""
    axes.set_xlabel(f"layer{note}; hatched: no such module, or not trained")
    axes.set_title("Where the model was changed")


def draw_strengths(axes: Axes, parts: list[Part]) -> None:
    """Draw the held-out loss against the strength of the update."""
    drawn = [part for part in parts if part.kind in ("base", "strength", "whole")]
    drawn.sort(key=lambda part: part.value)
    errors = [2 * part.against_trained.error for part in drawn]
    strengths, losses = [part.value for part in drawn], [part.loss for part in drawn]
    axes.errorbar(strengths, losses, errors, marker="o", capsize=3)
    axes.axvline(1, color="0.6", linestyle="--", linewidth=1)
    axes.set(
        xlabel="strength of the update (0: base, 1: as trained)\n"
        "bars: twice the error of the difference to 1",
        ylabel="held-out loss, nats per token",
        title="At another strength",
    )


def draw_parts(axes: Axes, parts: list[Part]) -> None:
    """Draw what each part keeps of the gain over the base model."""
    values = [100 * part.of_gain.value for part in parts]
    errors = [200 * part.of_gain.error for part in parts]
    titles = [part.title for part in parts]
    axes.barh(titles, values, xerr=errors, color="0.6", error_kw={"capsize": 3})
    axes.axvline(100, color="0.3", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(
        xlabel="% of the gain over the base model (bars: twice the error)", title="Which part?"
    )


def draw_gain_and_change(axes: Axes, parts: list[Part], shifts: dict[float, Shift]) -> None:
    """Draw a point for each strength: its gain over the base against its change elsewhere."""
    drawn = [part for part in parts if part.kind in ("strength", "whole") and part.value in shifts]
    drawn.sort(key=lambda part: part.value)
    changes = [0.0, *(shifts[part.value].kl_a_token().value for part in drawn)]
    gains = [0.0, *(100 * part.of_gain.value for part in drawn)]
    errors = [0.0, *(200 * part.of_gain.error for part in drawn)]
    names = ["base", *(f"x {part.value:g}" if part.value != 1 else "as trained" for part in drawn)]
    axes.errorbar(changes, gains, errors, marker="o", capsize=3)
    for change, gain, name in zip(changes, gains, names, strict=True):
        axes.annotate(
            name,
            (change, gain),
            (7, -14),
            textcoords="offset points",
            fontsize=8,
            zorder=6,
            bbox=BEHIND_A_NUMBER,
        )
    axes.margins(y=0.15)  # room for the name below the lowest point
    axes.axhline(100, color="0.6", linestyle="--", linewidth=1)
    axes.set(
        xlabel="change on other tasks, without a system message: KL(base || adapter) a token",
        ylabel="% of the gain",
        title="What is gained, and what else is changed, at each strength",
    )
