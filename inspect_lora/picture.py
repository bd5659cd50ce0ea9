"""picture.png: what an adapter does and does not do, in up to four panels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from inspect_lora import statistics as stats
from inspect_lora.common import InspectError, read_json, short
from inspect_lora.record import Record
from inspect_lora.statistics import Change

PICTURE = "picture.png"
KINDS_DRAWN, CHECKS_DRAWN, PARTS_DRAWN = 12, 10, 12
BASE, ADAPTER, WORSE = "0.55", "C0", "C3"  # colours


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
    for place, panel in enumerate(panels, 1):
        panel(figure.add_subplot(rows, columns, place), record)
    title = f"{short(record.adapter, 60)} on {short(record.conditions['base'], 50)}"
    figure.suptitle(title, parse_math=False)
    figure.savefig(record.folder / PICTURE)


def name_rows(axes: Any, names: list[str]) -> None:
    """Write a name beside each row, the first on top."""
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def draw_gains(axes: Any, record: Record) -> None:
    """Draw the gain on all replies, and below a line that of each kind, the largest first."""
    rows = [row for row in stats.gains(record) if math.isfinite(row.gain.high)][:KINDS_DRAWN]
    names = []
    for place, row in enumerate(rows):
        is_new = row.is_trained is False
        color = WORSE if row.gain.high < 0 else ADAPTER
        look = {"color": color, "capsize": 3, "mfc": "white" if is_new else color}
        margin = row.gain.high - row.gain.value
        axes.errorbar(row.gain.value, place, xerr=margin, fmt="o" if place else "D", **look)
        name = "all held-out replies" if row.kind == stats.ALL else short(row.kind)
        names.append(f"{name} ({row.replies})" + (", not trained" if is_new else ""))
    name_rows(axes, names)
    if len(rows) > 1:
        axes.axhline(0.5, color="0.6", linewidth=1)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.set_title("Held-out replies: gain over the base")
    axes.set_xlabel("loss of the base - loss of the adapter, nats a token")


def changes_of(record: Record) -> dict[str, Change]:
    """Return what is counted before and after: checks, the least passed first, tasks, pairs."""
    checks = stats.checks(record)
    order = sorted(checks, key=lambda title: checks[title].after / checks[title].count)
    order.sort(key=lambda title: title.startswith(stats.TASKS))
    changes = {title: checks[title] for title in order[:CHECKS_DRAWN]}
    for name, pairs in stats.pairs_by_kind(record.pairs).items():
        changes[f"pairs: {name.strip('()')}"] = stats.preferences(pairs).by_sum
    return changes


def draw_changes(axes: Any, record: Record) -> None:
    """Draw how many replies pass each check, and how many pairs are right: base, then adapter."""
    changes = changes_of(record)
    for place, row in enumerate(changes.values()):
        before, after = 100 * row.before / row.count, 100 * row.after / row.count
        ends = [before + 100 * row.change.low, before + 100 * row.change.high]
        color = WORSE if row.is_clear_loss else ADAPTER
        axes.plot(ends, [place, place], "-", color=color, linewidth=7, alpha=0.2)
        axes.plot([before, after], [place, place], "-", color=color)
        axes.plot(before, place, "o", mfc="white", color=BASE)
        axes.plot(after, place, "o", color=color)
        counts = f"{row.before} → {row.after} of {row.count}"
        axes.annotate(counts, (107, place), va="center", annotation_clip=False, fontsize=9)
    names = [f"other {name}" if name.startswith(stats.TASKS) else name for name in changes]
    name_rows(axes, [short(name, 30) for name in names])
    first_pair = sum(not name.startswith("pairs: ") for name in changes)
    if 0 < first_pair < len(changes):
        axes.axhline(first_pair - 0.5, color="0.6", linewidth=1)
    axes.set_xlim(-4, 104)
    titles = ["Replies that pass"] if first_pair else []
    titles += ["pairs with the good reply likelier"] if first_pair < len(changes) else []
    axes.set_title("; ".join(titles))
    axes.set_xlabel("per cent: ○ base, ● adapter, band: 95 % interval of the change")


def draw_strengths(axes: Any, record: Record) -> None:
    """Draw the gain against the change on other tasks, from the base on, a point a strength."""
    rows = [row for row in stats.strengths(record) if row.gain and row.kl]
    xs, ys = [0.0, *(row.kl.value for row in rows)], [0.0, *(row.gain.value for row in rows)]
    axes.plot(xs, ys, "-", color=ADAPTER, alpha=0.5)
    axes.plot(0, 0, "o", mfc="white", color=BASE)
    axes.annotate("base", (0, 0), (7, -3), textcoords="offset points")
    for row in rows:
        name = "as trained" if row.strength == 1 else f"x {row.strength:g}"
        marker = "D" if row.strength == 1 else "o"
        x, y = row.kl.value, row.gain.value
        errors = {"xerr": row.kl.high - x, "yerr": row.gain.high - y}
        errors = {key: margin for key, margin in errors.items() if math.isfinite(margin)}
        axes.errorbar(x, y, **errors, fmt=marker, color=ADAPTER, capsize=3)
        axes.annotate(name, (x, y), (6, -14), textcoords="offset points")
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.set_title("Weaker or stronger: gain and change elsewhere")
    axes.set_xlabel("KL(base || adapter) on other tasks, nats a token")
    axes.set_ylabel("gain on held-out replies, nats a token")


def draw_costs(axes: Any, record: Record) -> None:
    """Draw by how much the loss rises without each part; then the cuts."""
    effects = [row for row in stats.part_effects(record) if row.cost]
    effects = [row for row in effects if math.isfinite(row.cost.high)][:PARTS_DRAWN]
    for place, row in enumerate(effects):
        margin = row.cost.high - row.cost.value
        axes.errorbar(row.cost.value, place, xerr=margin, fmt="o", color=ADAPTER, capsize=3)
    name_rows(
        axes, [short(row.name if row.is_cut else f"without {row.name}", 30) for row in effects]
    )
    first_cut = sum(not row.is_cut for row in effects)
    if 0 < first_cut < len(effects):
        axes.axhline(first_cut - 0.5, color="0.6", linewidth=1)
    axes.axvline(0, color="0.3", linewidth=1)
    gain = stats.gain(stats.lines_of_parts(record)).value
    axes.set_title(f"Rise of the loss without a part (gain {gain:.2f})")
    axes.set_xlabel("nats a token, 95 % interval; parts overlap")


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
    axes.set(xlabel="step", ylabel="loss, nats a token")
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
