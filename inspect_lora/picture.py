"""picture.png: what an adapter does and does not do, in up to four panels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from inspect_lora import statistics as stats
from inspect_lora.common import InspectError, read_json, short
from inspect_lora.record import Record
from inspect_lora.statistics import Change, Estimate

PICTURE = "picture.png"
KINDS_DRAWN, CHECKS_DRAWN, PARTS_DRAWN = 12, 10, 12
BASE, ADAPTER = "0.55", "C0"  # colours
LETTER = 5.2  # about the width of a letter of SMALL text, in points
SMALL = 9


def draw(record: Record) -> None:
    """Draw the panels for which something was measured; raise ModuleNotFoundError if it cannot."""
    panels = [draw_changes] if changes_of(record) else []
    panels += [draw_gains] if record.lines else []
    strengths = stats.strengths(record)
    panels += [draw_strengths] if sum(bool(row.gain and row.kl) for row in strengths) > 1 else []
    panels += [draw_costs] if any(row.cost for row in stats.part_effects(record)) else []
    if not panels:
        (record.folder / PICTURE).unlink(missing_ok=True)
        return
    from matplotlib.figure import Figure

    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure((6 * columns, 4.2 * rows + 0.4), dpi=100, layout="constrained")
    places = figure.subfigures(rows, columns, squeeze=False, width_ratios=[1.1, 1][:columns])
    for panel, place in zip(panels, places.flat, strict=False):
        panel(place.add_subplot(), record)
    title = f"{short(record.adapter, 60)} on {short(record.conditions['base'], 50)}"
    figure.suptitle(title, parse_math=False)
    figure.savefig(record.folder / PICTURE)


def name_rows(axes: Any, names: list[str], upper: int) -> None:
    """Write a name beside each row, the first on top, and draw a line below the upper ones."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    if 0 < upper < len(names):
        axes.axhline(upper - 0.5, color="0.6", linewidth=1)


def draw_estimates(axes: Any, estimates: list[Estimate], hollow: list[int]) -> None:
    """Draw a row for each estimate and its interval; the dots of some rows are hollow."""
    for place, estimate in enumerate(estimates):
        fill = "white" if place in hollow else ADAPTER
        margin = estimate.high - estimate.value
        look = {"fmt": "o", "color": ADAPTER, "mfc": fill, "capsize": 3}
        axes.errorbar(estimate.value, place, xerr=margin, **look)
    axes.axvline(0, color="0.3", linewidth=1)


def draw_gains(axes: Any, record: Record) -> None:
    """Draw the gain on all replies, and below a line that of each kind, the largest first."""
    rows = [row for row in stats.gains(record) if math.isfinite(row.gain.high)][:KINDS_DRAWN]
    not_trained = [place for place, row in enumerate(rows) if row.is_trained is False]
    draw_estimates(axes, [row.gain for row in rows], not_trained)
    names = []
    for place, row in enumerate(rows):
        name = "all held-out replies" if row.kind == stats.ALL else short(row.kind)
        names.append(f"{name} ({row.replies}){', not trained' if place in not_trained else ''}")
    name_rows(axes, names, 1)
    axes.set_title("Held-out replies: gain over the base")
    axes.set_xlabel("loss of the base - loss of the adapter,\nnats per token, 95 % intervals")


def changes_of(record: Record) -> dict[str, Change]:
    """Return what is counted before and after: checks, the least passed first, tasks, pairs."""
    checks = stats.checks(record)
    changes = {title: checks[title] for title in list(checks)[:CHECKS_DRAWN]}
    for name, pairs in stats.pairs_by_kind(record.pairs).items():
        changes[f"pairs: {name.strip('()')}"] = stats.preferences(pairs).by_sum
    return changes


def draw_changes(axes: Any, record: Record) -> None:
    """Draw how many replies pass each check, and how many pairs are right: base, then adapter.

    The change stands beside it as text. Drawn as a bar, its interval looks like the adapter's.
    """
    changes = changes_of(record)
    for place, row in enumerate(changes.values()):
        before, after = 100 * row.before / row.count, 100 * row.after / row.count
        axes.plot([before, after], [place, place], "-", color=ADAPTER)
        axes.plot(before, place, "o", markersize=8, mfc="white", color=BASE)
        axes.plot(after, place, "o", markersize=5, color=ADAPTER)
    counts = [f"{row.before} → {row.after} of {row.count}" for row in changes.values()]
    in_points = [stats.points(row.change) for row in changes.values()]
    write_columns(axes, {"base → adapter": counts, "change in points (95 %)": in_points})
    names = [f"other {name}" if name.startswith(stats.TASKS) else name for name in changes]
    first_pair = sum(not name.startswith("pairs: ") for name in changes)
    name_rows(axes, [short(name, 30) for name in names], first_pair)
    axes.set_xlim(-5, 105)
    titles = ["Replies that pass a check"] if first_pair else []
    titles += ["pairs with the good reply likelier"] if first_pair < len(changes) else []
    axes.figure.suptitle("; ".join(titles))  # over the names and columns, too
    axes.set_xlabel("per cent; hollow: base, filled: adapter")


def write_columns(axes: Any, columns: dict[str, list[str]]) -> None:
    """Write a text beside each row, in columns at the right with their heads above them."""
    left = 2 * LETTER
    for head, texts in columns.items():
        beside = {"textcoords": "offset points", "fontsize": SMALL, "annotation_clip": False}
        axes.annotate(head, (1, 1), (left, 5), xycoords="axes fraction", **beside)
        for place, text in enumerate(texts):
            where = {"xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(text, (1, place), (left, 0), **where, **beside)
        left += LETTER * (2 + max(map(len, [head, *texts])))


def draw_strengths(axes: Any, record: Record) -> None:
    """Draw the gain against the change on other tasks, from the base on, a point a strength."""
    rows = [row for row in stats.strengths(record) if row.gain and row.kl]
    xs, ys = [0.0, *(row.kl.value for row in rows)], [0.0, *(row.gain.value for row in rows)]
    axes.plot(xs, ys, "-", color=ADAPTER, alpha=0.5)
    axes.plot(0, 0, "o", mfc="white", color=BASE)
    axes.annotate("base", (0, 0), (7, -3), textcoords="offset points")
    for number, row in enumerate(rows):
        name = "as trained" if row.strength == 1 else f"x {row.strength:g}"
        marker = "D" if row.strength == 1 else "o"
        x, y = row.kl.value, row.gain.value
        errors = {"xerr": row.kl.high - x, "yerr": row.gain.high - y}
        errors = {key: margin for key, margin in errors.items() if math.isfinite(margin)}
        axes.errorbar(x, y, **errors, fmt=marker, color=ADAPTER, capsize=3)
        # Neighbours have their names above and below in turn, beyond the ends of their intervals.
        margin, turn = errors.get("yerr", 0.0), -1 if number % 2 else 1
        look = {"ha": "center", "va": "top" if number % 2 else "bottom"}
        axes.annotate(
            name, (x, y + turn * margin), (0, 5 * turn), textcoords="offset points", **look
        )
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.set_title("Weaker or stronger: gain, and change on other tasks")
    axes.set_xlabel(
        "KL(base || adapter) on other tasks, nats per token, 95 % intervals\n"
        "(the strengths share their replies, so their differences are known better)"
    )
    axes.set_ylabel(f"gain on {replies_of_parts(record)}, nats per token")


def replies_of_parts(record: Record) -> str:
    """Return how many of the held-out replies measure strengths and parts."""
    return f"{len(record.part_lines)} of {len(record.lines)} held-out replies"


def draw_costs(axes: Any, record: Record) -> None:
    """Draw by how much the loss rises without each part; then the cuts."""
    effects = [row for row in stats.part_effects(record) if row.cost]
    effects = [row for row in effects if math.isfinite(row.cost.high)][:PARTS_DRAWN]
    draw_estimates(axes, [row.cost for row in effects], [])
    names = [short(row.name if row.is_cut else f"without {row.name}", 30) for row in effects]
    name_rows(axes, names, sum(not row.is_cut for row in effects))
    gain = stats.gain(stats.lines_of_parts(record)).value
    axes.set_title("Rise of the loss without a part (parts overlap)")
    axes.set_xlabel(
        f"nats per token, 95 % intervals\n({replies_of_parts(record)}, whose gain is {gain:.2f})"
    )


# ---- losses.png: how trainings went

SMOOTHED = 0.9  # the share that a mean over the steps before has in each point of a curve


def draw_losses(folders: list[str], path: Path) -> None:
    """Draw the losses of runs from run.json: in training, and held-out with the base's at step 0.

    Of a run that is still training the newest checkpoint's is read.
    """
    from matplotlib.figure import Figure

    histories = {folder: newest_history(Path(folder)) for folder in folders}
    figure = Figure((10, 5.5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for number, (folder, history) in enumerate(histories.items()):
        colour = f"C{number}"
        trained = {row["step"]: row["loss"] for row in history if "loss" in row}
        axes.plot(trained.keys(), trained.values(), color=colour, alpha=0.2, linewidth=1)
        axes.plot(trained.keys(), smoothed([*trained.values()]), color=colour, label=folder)
        held_out = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
        if held_out:
            label = f"{folder}, held out"
            axes.plot(held_out.keys(), held_out.values(), "o--", color=colour, label=label)
        if 0 in held_out:
            axes.axhline(held_out[0], color=colour, linestyle=":", label=f"{folder}, the base")
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    figure.savefig(path)


def newest_history(folder: Path) -> list[dict[str, float]]:
    """Return what was logged in the newest run.json of a folder; raise InspectError if nothing."""
    paths = [*folder.glob("run.json"), *folder.glob("checkpoints/*/checkpoint-*/run.json")]
    newest = max(paths, key=lambda path: path.stat().st_mtime, default=folder / "run.json")
    history = read_json(newest).get("loss_history") or []
    if not history:
        raise InspectError(f"{newest} has no losses yet, or is not there.")
    return history


def smoothed(values: list[float]) -> list[float]:
    """Return means over the values so far, in which the newest weigh most (as Adam's)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, 1):
        mean = SMOOTHED * mean + (1 - SMOOTHED) * value
        means.append(mean / (1 - SMOOTHED**count))
    return means
