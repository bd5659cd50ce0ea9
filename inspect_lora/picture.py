"""Draws lora.png: gain and change at each strength, the parts, the run's losses, the updates."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from inspect_lora.elsewhere import Shift
from inspect_lora.findings import Findings, headline
from inspect_lora.parts import Part

# A README shows it at 900 pixels or fewer, where the letters must be legible still.
LOOK = {"font.size": 13, "axes.titlesize": 15, "figure.titlesize": 15, "axes.titleweight": "bold"}
COLOURS = {"group": "C0", "target": "0.75", "cut": "C1"}  # one for each kind of part
LEGEND = {"group": "group alone", "target": "target alone", "cut": "cut"}


def draw_picture(found: Findings, path: Path) -> bool:
    """Draw a panel for each thing that was measured; return whether there was any."""
    losses = logged(found, "loss")
    parts = [part for part in found.parts if part.kind in COLOURS]
    shares = []  # the panels that show shares of the gain
    if found.elsewhere and found.shares_are_meant():
        shares.append("strengths")
    if parts and found.shares_are_meant():
        shares.append("parts")
    rows = [[shares[0], shares[-1]]] if shares else []
    if losses:
        rows.append(["losses", "losses"])
    if found.updates:
        rows.append(["updates", "updates"])
    if not rows:
        return False
    with matplotlib.rc_context(LOOK):
        figure = Figure((11, 1 + 3.6 * len(rows)), dpi=120, layout="constrained")
        panels = figure.subplot_mosaic(rows)
        config = found.adapter.model.peft_config["default"]
        verdict = f": {headline(found)}" if found.losses else ""  # no panel shows replies
        figure.suptitle(
            f"LoRA on {found.adapter.base.rstrip('/').rpartition('/')[2]}\n"
            f"r = {config.r}, alpha = {config.lora_alpha}{verdict}",
            parse_math=False,
        )
        if "strengths" in shares:
            draw_gain_and_change(panels["strengths"], found.parts, found.elsewhere.without_system)
        if "parts" in shares:
            draw_parts(panels["parts"], parts)
        if losses:
            draw_losses(panels["losses"], losses, logged(found, "eval_loss"))
        if found.updates:
            depth = found.adapter.model.config.get_text_config().num_hidden_layers
            draw_updates(panels["updates"], depth, found.updates)
        if shares:
            figure.supxlabel("Error bars: one standard error", fontsize=12)
        figure.savefig(path)
    return True


def logged(found: Findings, key: str) -> dict[int, float]:
    """Return what the run logged, if it is known, as {step: loss}; the base is at step 0."""
    history = found.adapter.run.record.get("loss_history", []) if found.adapter.run else []
    return {int(entry["step"]): entry[key] for entry in history if key in entry}


def draw_gain_and_change(axes: Axes, parts: list[Part], shifts: dict[float, Shift]) -> None:
    """Draw, by strength, the share of the gain on the left scale and the KL on the right one."""
    drawn = [part for part in parts if part.kind in ("strength", "whole") and part.value in shifts]
    drawn.sort(key=lambda part: part.value)
    strengths = [0.0, *(part.value for part in drawn)]
    gains = [0.0, *(100 * part.of_gain.value for part in drawn)]
    errors = [0.0, *(100 * part.of_gain.error for part in drawn)]
    # Of two models that are nearly equal, rounding can bring the KL below 0.
    changes = [0.0, *(max(0.0, shifts[part.value].kl_a_token().value) for part in drawn)]
    axes.errorbar(strengths, gains, errors, marker="o", capsize=3, color="C0")
    axes.axvline(1, color="0.6", linestyle=":", linewidth=1)
    axes.tick_params(axis="y", labelcolor="C0")
    axes.set(xlabel="strength of the update; 1 is as trained", title="Gain and change by strength")
    axes.set_ylabel(f"% of the gain, {len(parts[0].losses)} replies", color="C0")
    right = axes.twinx()
    right.plot(strengths, changes, marker="s", linestyle="--", color="C1")
    right.tick_params(axis="y", labelcolor="C1")
    right.set_ylabel("KL on the other tasks, nats", color="C1")
    right.set_ylim(0, max(0.001, 1.06 * max(changes)))  # what is rounding must not fill the panel


def draw_parts(axes: Axes, parts: list[Part]) -> None:
    """Draw what each part keeps of the gain over the base model."""
    values = [100 * part.of_gain.value for part in parts]
    errors = [100 * part.of_gain.error for part in parts]
    colours = [COLOURS[part.kind] for part in parts]
    names = [part.title.removesuffix(" alone") for part in parts]
    axes.barh(names, values, xerr=errors, color=colours, error_kw={"capsize": 3})
    axes.axvline(100, color="0.3", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=11)
    axes.set(xlabel=f"% of the gain, {len(parts[0].losses)} replies", title="What each part keeps")
    key = [
        Patch(color=COLOURS[kind], label=LEGEND[kind])
        for kind in dict.fromkeys(part.kind for part in parts)
    ]
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)}
    axes.legend(handles=key, fontsize=11, ncols=3, columnspacing=1.2, **place)


def draw_losses(axes: Axes, losses: dict[int, float], evals: dict[int, float]) -> None:
    """Draw each step's loss thinly, their running mean boldly, and the held-out losses as dots.

    The numbers of these stand in the legend, where they cover no curve.
    """
    steps, values = list(losses), list(losses.values())
    # The mean is over a thirtieth of a long run, and over up to ten steps of a short one.
    width = max(1, len(values) // 30, min(10, len(values) // 4))
    means = [statistics.fmean(values[max(0, n - width) : n]) for n in range(1, len(values) + 1)]
    if width > 1:
        axes.plot(steps, values, color="0.8", linewidth=0.8, label="training, as logged")
    name = f"training, mean of the last {width}" if width > 1 else "training, as logged"
    marker = "o" if len(values) == 1 else ""  # one point makes no line
    axes.plot(steps, means, color="C0", linewidth=2, marker=marker, label=name)
    if evals:
        label = f"held-out: {evals_in_words(list(evals.values()))}"
        axes.plot(list(evals), list(evals.values()), "o", color="black", label=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.margins(y=0.15)
    axes.set(xlabel="step", ylabel="loss, nats a token", title="The training")
    axes.legend(fontsize=11)


def evals_in_words(losses: list[float]) -> str:
    """Return the held-out losses; of many the first, the lowest and the last one."""
    if len(losses) <= 4:
        return ", ".join(f"{loss:.3f}" for loss in losses)
    return f"{losses[0]:.3f} at first, {min(losses):.3f} at best, {losses[-1]:.3f} at last"


def draw_updates(axes: Axes, depth: int, updates: dict[str, list[dict[str, Any]]]) -> None:
    """Draw the size of each module's update against its W, layers across and targets down.

    A layer's experts are one cell, which has their mean. What is in no layer, such as lm_head, has
    no place in the map, and its size is written below.

    The colours end at the size that 19 of 20 modules do not exceed, so that few large ones leave
    a difference to be seen among the others.
    """
    sizes, outside = {}, []
    for target, rows in updates.items():
        cells: list[list[float]] = [[] for _ in range(depth)]
        for row in rows:
            if row["layer"] is None:
                outside.append(f"{target} {100 * row['update']:.2g} %")
            else:
                cells[row["layer"]].append(100 * row["update"])
        if any(cells):
            sizes[target] = [statistics.fmean(cell) if cell else math.nan for cell in cells]
    axes.set_title("Where the model was changed")
    if sizes:
        draw_map(axes, sizes)
    else:
        axes.set(xticks=[], yticks=[])
    axes.set_xlabel("; ".join(filter(None, [axes.get_xlabel(), *outside])))


def draw_map(axes: Axes, sizes: dict[str, list[float]]) -> None:
    """Draw a cell for each target and layer, in colours for its size in %."""
    known = sorted(size for row in sizes.values() for size in row if math.isfinite(size))
    largest, end = known[-1], known[round(0.95 * (len(known) - 1))]
    is_clipped = largest > 1.2 * end > 0
    image = axes.imshow(
        list(sizes.values()),
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=(end if is_clipped else largest) or 1,  # an adapter that was not trained has only 0
        cmap="viridis",
    )
    bar = axes.figure.colorbar(
        image,
        ax=axes,
        location="bottom",
        aspect=50,
        shrink=0.6,
        extend="max" if is_clipped else "neither",
        ticks=MaxNLocator(6),
    )
    note = f"; the largest is {largest:.3g} %" if is_clipped else ""
    bar.set_label(f"size of the update, % of the weight W{note}")
    depth = len(next(iter(sizes.values())))
    axes.set_xticks(range(0, depth, 1 + depth // 24))
    axes.set_yticks(range(len(sizes)), list(sizes))
    has_gaps = len(known) < len(sizes) * depth
    if has_gaps:
        axes.patch.set(hatch="xx", edgecolor="silver")  # shows through where there is no module
    axes.set_xlabel("layer" + (" (hatched: nothing trained)" if has_gaps else ""))
