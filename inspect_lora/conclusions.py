"""What is concluded from the numbers: at most a sentence each on alpha, the targets, r, and others.

What each sentence may claim was tested by training the alternatives; docs/evidence.md shows how.
"""

from __future__ import annotations

from typing import Any

import peft

from inspect_lora.adapters import can_scale_and_cut, can_take_apart
from inspect_lora.common import pluralize
from inspect_lora.elsewhere import Elsewhere, Shift
from inspect_lora.parts import THE_SAME_WITHIN, WORTH_REPORTING, Part, why_it_is_not_merged
from inspect_lora.replies import Answered
from inspect_lora.scores import FEWEST_LINES, Estimate, Losses, is_conclusive, ratio_with_error

MORE = " (--examples 200 measures more, if the file has more)"


def of_kind(parts: list[Part], kind: str) -> list[Part]:
    """Return the parts of one kind."""
    return [part for part in parts if part.kind == kind]


def conclusions(
    parts: list[Part],
    losses: Losses,
    gain: Estimate,
    lines: int | None = None,
    shifts: dict[float, Shift] | None = None,
) -> list[str]:
    """Return what the parts support.

    Args:
        parts: as they were measured.
        losses: of the examples that the parts are measured on.
        gain: on all examples; whether the adapter is better than its base is said of it alone.
        lines: of all examples; by default those of the examples that the parts are measured on.
        shifts: how far each strength moves the model elsewhere, if that was measured.
    """
    of_parts = len(set(losses.lines))
    lines = of_parts if lines is None else lines
    if losses.trained == losses.base:
        return [
            "All losses are the same with and without the adapter, so it changes nothing. Perhaps "
            "it was saved before it was trained, when B is 0."
        ]
    if lines < FEWEST_LINES:
        return [
            f"The held-out lines are too few to tell anything: {lines} measured, "
            f"{FEWEST_LINES} needed."
        ]
    if not gain.is_clear() or gain.value < 0:
        return [about_no_gain(parts if of_parts >= FEWEST_LINES else [], gain, shifts or {})]
    if of_parts < FEWEST_LINES:
        return [
            f"The replies that measure the parts are too few: {pluralize(of_parts, 'line')} "
            f"measured, {FEWEST_LINES} needed{MORE}."
        ]
    if not is_conclusive(losses):
        return [
            f"The gain is not clear on the {len(losses.tokens)} replies that measure the parts "
            f"({losses.gain()}), so the parts say nothing{MORE}."
        ]
    sentences = [about_alpha(parts, shifts or {}), about_targets(parts)]
    sentences += [about_rank(parts), about_merging(parts)]
    return [sentence for sentence in sentences if sentence]


def about_no_gain(parts: list[Part], gain: Estimate, shifts: dict[float, Shift]) -> str:
    """Return the sentence on an adapter that is not clearly better than the base model.

    That the run went too far is said only if the same update, weaker, is clearly better than the
    base: an update that does harm does less of it when it is weaker, and that shows nothing.
    """
    weaker = [part for part in of_kind(parts, "strength") if float(part.value) < 1]
    is_too_strong = any(
        part.gained.value > 0 and part.gained.is_clear(len(weaker)) for part in weaker
    )
    so = "worse" if gain.is_clear() else "not clearly better"
    if is_too_strong:
        best = float(min(weaker, key=lambda part: part.loss).value)
        return (
            f"The adapter is {so} than the base model, but the same update is better than it when "
            "it is weaker: it is too strong. Worth trying next: a shorter training, a lower "
            f"learning rate or a smaller alpha. x {best:g} has the lowest loss of "
            f"{pluralize(len(weaker), 'weaker one')} on these replies. {about_export(best, shifts)}"
            " What its parts are worth cannot be said."
        )
    if gain.is_clear():
        also = ", and no weaker update is clearly better" if weaker else ""
        return (
            f"The adapter is worse than the base model{also}. If "
            "the run's held-out losses rose at the end, it memorized its conversations: use the "
            "best epoch, train fewer epochs, or find more conversations. Otherwise check that the "
            "held-out conversations are of the kind that was trained on, and that the tokenizer "
            "and the chat template are those of the training."
        )
    return (
        "The adapter is not clearly better than the base model: the 95 % interval of its gain "
        "holds 0. So its parts say nothing. More steps, a higher learning rate or more held-out "
        "lines may help."
    )


def best_strength(parts: list[Part]) -> Part | None:
    """Return the strength with the lowest loss, of those that are clearly better if some are."""
    strengths = of_kind(parts, "strength")
    better = [part for part in strengths if part.verdict(len(strengths)) == "better"]
    return min(better or strengths, key=lambda part: part.loss, default=None)


def about_export(strength: float, shifts: dict[float, Shift]) -> str:
    """Return what `export --scale` would write, and what is known of it: it is no advice."""
    if strength not in shifts:
        known = "; its KL on the other tasks was not measured, and"
    elif len(shifts[strength].kl) < FEWEST_LINES:
        known = "; the other tasks are too few to tell its KL, and"
    else:
        known = f", at {times_the_kl(shifts[strength], shifts[1.0])};"
    return f"`export --scale {strength:g}` writes it{known} the checks were not asked at it."


def times_the_kl(shift: Shift, trained: Shift) -> str:
    """Return a strength's KL on the other tasks beside that of the adapter as trained."""
    moved = ratio_with_error(shift.kl, trained.kl)
    return f"{moved.value:.2f} ± {moved.error:.2f} times the KL on the other tasks"


def about_alpha(parts: list[Part], shifts: dict[float, Shift]) -> str:
    """Return the sentence on the strength of the update."""
    strengths = of_kind(parts, "strength")
    best = best_strength(parts)
    if not best:
        return ""
    if best.verdict(len(strengths)) != "better":
        several = len(strengths)
        largest = max(part.of_gain.value + part.of_gain.margin(several) for part in strengths)
        if largest > 1 + THE_SAME_WITHIN:
            return (
                f"alpha: too few held-out replies to tell whether another strength is better{MORE}."
            )
        tried = [float(part.value) for part in strengths]
        return (
            f"alpha: no other strength that was tried (x {min(tried):g} to x {max(tried):g}) has a "
            f"clearly lower loss (by over {100 * WORTH_REPORTING:.0f} % of the gain)."
        )
    if float(best.value) < 1:
        so, advice = "strong", "a shorter training, a lower learning rate or a smaller alpha"
    else:
        so, advice = "weak", "a longer training, a higher learning rate or a larger alpha"
    return (
        f"alpha: at x {best.value:g} of its strength the same update has a lower loss "
        f"({best.of_gain.percent()} of the gain; the best of {len(strengths)} strengths, on these "
        f"replies), so it is too {so} for the loss. Worth trying next: {advice}. "
        f"{about_export(float(best.value), shifts)}"
    )


def about_targets(parts: list[Part]) -> str:
    """Return the sentence on attention, feed-forward, DeltaNet and any other group of targets."""
    groups = of_kind(parts, "group")
    if not groups:
        return ""
    verdicts = {part.value: part.verdict(len(groups)) for part in groups}
    enough = [part for part in groups if verdicts[part.value] in ("same", "better")]
    if enough:
        best = max(enough, key=lambda part: part.of_gain.value)
        return (
            f"targets: the update of {best.value} alone keeps {best.of_gain.percent()} of the "
            f"gain; what the other targets add is less than {100 * THE_SAME_WITHIN:.0f} % of it."
        )
    if "unclear" in verdicts.values():
        return f"targets: too few held-out replies to tell whether one group would do alone{MORE}."
    listed = ", ".join(f"{part.value} keeps {part.of_gain.percent()}" for part in groups)
    return f"targets: each group alone clearly loses some of the gain: {listed}."


def cut_that_is_enough(cuts: list[Part]) -> Part | None:
    """Return the shortest cut that keeps the gain, if one does; the cuts begin with the mildest."""
    enough = None
    for part in cuts:
        if part.verdict() not in ("same", "better"):
            break  # a shorter cut that does well is chance
        enough = part
    return enough


def about_rank(parts: list[Part]) -> str:
    """Return the sentence on what the update keeps when it is cut to fewer directions."""
    cuts = of_kind(parts, "cut")
    if not cuts:
        return ""
    enough = cut_that_is_enough(cuts)
    if not enough and cuts[0].verdict() == "unclear":
        return f"r: too few held-out replies to tell what a cut costs{MORE}."
    told = enough or cuts[0]
    sentence = (
        f"r: {told.title} (the strongest), the update keeps {told.of_gain.percent()} of the gain."
    )
    if enough:
        return f"{sentence} Training with a smaller r is another run, and may end elsewhere."
    return f"{sentence} Whether a larger r gains more, only another run can tell."


def about_merging(parts: list[Part]) -> str:
    """Return the sentence on an update that loses by being rounded into the base's weights."""
    lossy = [part for part in of_kind(parts, "merged") if part.verdict() == "worse"]
    if not lossy:
        return ""
    return (
        f"{lossy[0].title}: rounded into the base's weights, as merge_and_unload() writes them, "
        f"the update keeps {lossy[0].of_gain.percent()} of the gain. Serve it as an adapter, or "
        "merge it into float32 weights."
    )


def what_is_not_measured(model: peft.PeftModel) -> list[str]:
    """Return a sentence on parts that an adapter of another kind does not have."""
    if not can_take_apart(model):
        return ["More than LoRA was trained, so the adapter is not taken apart."]
    if not can_scale_and_cut(model):
        return [
            "This LoRA is more than the update scaling x B A, so it is neither scaled nor cut, nor "
            "is it merged."
        ]
    if reason := why_it_is_not_merged(model):
        return [f"merged: what merging would lose was not measured, since {reason}."]
    return []


# ---- How large the updates are, what else was changed, and whether replies end


LARGE_UPDATE = 0.4  # of W; docs/evidence.md tells what runs with larger ones and others came to


def about_updates(updates: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the sentence on updates that are large beside their weights, if there are any.

    It is an observation: one run was measured that had such updates, and it was ruined.
    """
    sizes = [(row["update"], target) for target, rows in updates.items() for row in rows]
    large = [one for one in sizes if one[0] > LARGE_UPDATE]
    if not large:
        return []
    largest, target = max(large)
    return [
        f"updates: {len(large)} of {pluralize(len(sizes), 'update')} are over "
        f"{100 * LARGE_UPDATE:.0f} % of the weight W that they are added to, the largest "
        f"{100 * largest:.0f} % ({target}). That is an observation and no verdict. In the runs of "
        "docs/evidence.md, the one that was ruined by too high a learning rate had 47 to 61 %; "
        "of good ones the means by target were 1 to 3 %, and the largest single update 6 %."
    ]


def about_change(found: Elsewhere, in_file: int | None = None) -> str:
    """Return the sentence on how far the adapter moves the model where it should not.

    Args:
        found: what was measured.
        in_file: how many tasks there are; by default those that were measured.
    """
    shift = found.without_system[1.0]
    tasks = len(shift.kl)
    if tasks < FEWEST_LINES:
        more = MORE if (in_file or 0) > tasks else ""
        return (
            f"change: {pluralize(tasks, 'other task')} cannot tell how far the model was moved; "
            f"{FEWEST_LINES} are needed{more}."
        )
    kl, other = shift.kl_a_token(), shift.other_tokens()
    return (
        f"change: in the base's own replies to {len(found.tasks)} other tasks the top-1 token "
        f"differs at {other.percent()} of the token positions, and the KL divergence from the base "
        f"is {kl.without_sign()} nats a token (0 if nothing differs). It says how far the model "
        "was moved, not that it got worse."
    )


def about_strength(parts: list[Part], shifts: dict[float, Shift], adapter: str) -> str:
    """Return what a weaker update keeps of the gain, and how much less KL it has.

    It names the weakest strength whose gain is the same as the whole's, or better, and whose KL is
    clearly smaller. Both are told with their errors: it is a trade, and no advice.
    """
    shares = {part.value: part.of_gain for part in parts if part.kind == "strength"}
    weaker = [strength for strength in sorted(shifts) if strength < 1 and strength in shares]
    if len(shifts[1.0].kl) < FEWEST_LINES:
        return ""
    for strength in weaker:
        share = shares[strength]
        keeps = share.value - share.margin(len(weaker)) > 1 - THE_SAME_WITHIN
        moved = ratio_with_error(shifts[strength].kl, shifts[1.0].kl)
        less = Estimate(1 - moved.value, moved.error, moved.effective_lines)
        if keeps and less.value > WORTH_REPORTING and less.is_clear(len(weaker)):
            return (
                f"strength: x {strength:g}: {share.percent()} of the gain at "
                f"{times_the_kl(shifts[strength], shifts[1.0])} (picked among {len(weaker)} weaker "
                "ones on these replies); the checks were not asked at it. "
                f"`export {adapter} FOLDER --scale {strength:g}` writes it."
            )
    return ""


# ---- Whether replies end


def about_endings(samples: list[Answered], checked: list[Answered]) -> list[str]:
    """Return the sentences on replies that did not end by themselves: mostly none."""
    sentences = []
    base, adapter = cut_replies(samples)
    if adapter:
        sentences.append(
            f"replies: {adapter} of {len(samples)} of the adapter's replies did not end within "
            f"{samples[0].max_new_tokens} tokens (of the base's, {base}); --max_new_tokens allows "
            "more."
        )
    base, adapter = cut_replies(checked)
    if base or adapter:
        limits = sorted({one.max_new_tokens for one in checked})
        sentences.append(
            f"checks: of {pluralize(len(checked), 'reply')} each, {base} of the base's and "
            f"{adapter} of the adapter's were cut at {' or '.join(map(str, limits))} tokens and "
            "judged as they stood. Cuts favour checks that forbid words, and hurt those that "
            "require them."
        )
    known = {one.prompt_hash for one in checked}  # a sample of these is no other reply
    asked = [*checked, *(one for one in samples if one.prompt_hash not in known)]
    base, _ = cut_replies(asked)
    if 2 * base > len(asked):
        sentences.append(
            f"base: {base} of its {pluralize(len(asked), 'reply')} were cut before they ended, "
            "so a difference from them says little about the adapter's replies: read those."
        )
    return sentences


def cut_replies(asked: list[Answered]) -> tuple[int, int]:
    """Return how many replies of base and adapter did not end by themselves."""
    base = [one for one in asked if not one.base.ended]
    adapter = [one for one in asked if not one.adapter.ended]
    return len(base), len(adapter)
