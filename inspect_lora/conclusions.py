"""What is concluded from the numbers: at most a sentence each on alpha, the targets, r, and others.

What each sentence may claim was tested by training the alternatives; docs/evidence.md shows how.
"""

from __future__ import annotations

import peft

from inspect_lora.adapters import can_scale_and_cut, can_take_apart
from inspect_lora.elsewhere import Elsewhere, Shift
from inspect_lora.parts import THE_SAME_WITHIN, WORTH_REPORTING, Part
from inspect_lora.replies import Answered
from inspect_lora.scores import (
    FEWEST_LINES,
    Estimate,
    Losses,
    errors_needed,
    is_conclusive,
    ratio_with_error,
)

MORE = " (--examples 200 measures more, if the file has more)"


def of_kind(parts: list[Part], kind: str) -> list[Part]:
    """Return the parts of one kind."""
    return [part for part in parts if part.kind == kind]


def conclusions(parts: list[Part], losses: Losses) -> list[str]:
    """Return what the parts support, measured on the examples that these losses are of."""
    lines = len(set(losses.lines))
    if losses.trained == losses.base:
        return [
            "With the adapter and without it all losses are the same: it changes nothing. Perhaps "
            "it was saved before it was trained, when B is 0."
        ]
    if lines < FEWEST_LINES:
        return [
            f"The held-out lines are too few to tell anything: {lines} measured, "
            f"{FEWEST_LINES} needed{MORE}."
        ]
    if not is_conclusive(losses):
        return [about_no_gain(parts, losses.gain())]
    sentences = [about_alpha(parts), about_targets(parts), about_rank(parts)]
    return [sentence for sentence in sentences if sentence]


def about_no_gain(parts: list[Part], gain: Estimate) -> str:
    """Return the sentence on an adapter that is not clearly better than the base model.

    That the run went too far is said only if the same update, weaker, is clearly better than the
    base: an update that does harm does less of it when it is weaker, and that shows nothing.
    """
    strengths = of_kind(parts, "strength")
    needed = errors_needed(len(strengths))
    weaker = [part for part in strengths if float(part.value) < 1]
    is_too_strong = any(part.gained.value > 0 and part.gained.is_clear(needed) for part in weaker)
    so = "worse" if gain.is_clear() else "not better"
    if is_too_strong:
        return (
            f"The adapter is {so} than the base model, but the same update is better than it when "
            "it is weaker: it is too strong. Try `export --scale`, a shorter training, a lower "
            "learning rate or a smaller alpha. What its parts are worth cannot be said."
        )
    if gain.is_clear():
        return (
            "The adapter is worse than the base model, and no weaker update is clearly better. If "
            "the run's held-out losses rose at the end, it learned its conversations by heart: "
            "publish the best epoch, train fewer, or find more conversations. Else check that the "
            "held-out conversations are of the kind that was trained on, and that tokenizer and "
            "template are the training's."
        )
    return (
        "The adapter is not better than the base model by more than twice the error, so its parts "
        "say nothing. More steps, a higher learning rate or more held-out lines may help."
    )


def best_strength(parts: list[Part]) -> Part | None:
    """Return the strength with the lowest loss, of those that are clearly better if some are."""
    strengths = of_kind(parts, "strength")
    better = [part for part in strengths if part.verdict(len(strengths)) == "better"]
    return min(better or strengths, key=lambda part: part.loss, default=None)


def about_alpha(parts: list[Part]) -> str:
    """Return the sentence on the strength of the update."""
    strengths = of_kind(parts, "strength")
    best = best_strength(parts)
    if not best:
        return ""
    if best.verdict(len(strengths)) != "better":
        largest = max(part.of_gain.value + 2 * part.of_gain.error for part in strengths)
        if largest > 1 + THE_SAME_WITHIN:
            return (
                f"alpha: too few held-out replies to tell whether another strength is better{MORE}."
            )
        return (
            "alpha: no other strength of this update has a clearly lower loss (by over "
            f"{100 * WORTH_REPORTING:.0f} % of the gain)."
        )
    if float(best.value) < 1:
        so, advice = "strong", "a shorter training, a lower learning rate, a smaller alpha"
    else:
        so, advice = "weak", "a longer training, a higher learning rate, a larger alpha"
    return (
        f"alpha: at x {best.value:g} of its strength the same update has a lower loss "
        f"({100 * (best.of_gain.value - 1):.0f} % more of the gain), so it is too {so} for the "
        f"loss. Worth trying next: {advice}, or `export --scale {best.value:g}`."
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
            f"targets: the update of {best.value} alone keeps {best.share()} of the "
            f"gain; what the other targets add is less than {100 * THE_SAME_WITHIN:.0f} % of it."
        )
    if "unclear" in verdicts.values():
        return f"targets: too few held-out replies to tell whether one group would do alone{MORE}."
    listed = ", ".join(f"{part.value} keeps {part.share()}" for part in groups)
    return f"targets: each group alone clearly loses some of the gain: {listed}."


def cut_that_is_enough(cuts: list[Part]) -> Part | None:
    """Return the shortest cut that keeps the gain, if one does; the cuts begin with the mildest."""
    verdicts = [part.verdict() for part in cuts]
    enough = None
    for part, verdict in zip(cuts, verdicts, strict=True):
        if verdict not in ("same", "better"):
            break  # a shorter cut that does well is chance
        enough = part
    loses_little = cuts[0].of_gain.value >= 1 - THE_SAME_WITHIN
    if enough is None and verdicts[0] == "worse" and loses_little:
        return cuts[0]  # it loses clearly, but too little to ask for a larger r
    return enough


def about_rank(parts: list[Part]) -> str:
    """Return the sentence on the number of directions that the update needs."""
    cuts = of_kind(parts, "cut")
    if not cuts:
        return ""
    enough = cut_that_is_enough(cuts)
    if enough:
        return (
            f"r: {enough.title}, its strongest, the update keeps {enough.share()} of the "
            "gain, so this adapter needs no more of them. Training with a smaller r is another "
            "run, and may end elsewhere."
        )
    if cuts[0].verdict() == "unclear":
        return f"r: too few held-out replies to tell how many directions are needed{MORE}."
    return (
        f"r: {cuts[0].title}, the update keeps only {cuts[0].share()} of the gain, so it "
        "uses all its directions; whether a larger r gains more, only another run can tell."
    )


def what_is_not_measured(model: peft.PeftModel) -> list[str]:
    """Return a sentence on parts that an adapter of another kind does not have."""
    if not can_take_apart(model):
        return ["More than LoRA was trained, so the adapter is not taken apart."]
    if not can_scale_and_cut(model):
        return ["This LoRA is more than the update scaling x B A, so it is neither scaled nor cut."]
    return []


# ---- What else was changed, and whether replies end


def about_change(found: Elsewhere) -> str:
    """Return the sentence on how far the adapter moves the model where it should not."""
    shift = found.without_system[1.0]
    kl, other = shift.kl_a_token(), shift.other_tokens()
    return (
        f"change: on {found.tasks} other tasks another token is the likeliest at "
        f"{100 * other.value:.1f} % of the places, and the probabilities are {kl.value:.4f} nats a "
        "token from the base's (KL; 0 if none differs). It says how far the model was moved, not "
        "that it got worse."
    )


def about_strength(parts: list[Part], shifts: dict[float, Shift], adapter: str) -> str:
    """Return the sentence on a weaker update that keeps the gain and moves the model less.

    It names the weakest strength whose gain is the same as the whole's, or better, and whose KL is
    clearly smaller.
    """
    shares = {part.value: part.of_gain for part in parts if part.kind == "strength"}
    for strength in sorted(shifts):
        if strength >= 1 or strength not in shares:
            continue
        share = shares[strength]
        keeps = share.value - 2 * share.error > 1 - THE_SAME_WITHIN
        moved = ratio_with_error(shifts[strength].kl, shifts[1.0].kl)
        less = Estimate(1 - moved.value, moved.error)
        if keeps and less.value > WORTH_REPORTING and less.is_clear(errors_needed(len(shifts))):
            cost = max(0.0, 100 * (1 - share.value))
            return (
                f"strength: if other tasks matter too, x {strength:g} costs {cost:.0f} % of the "
                f"gain and moves the model {moved.value:.2f} times as far there: `export {adapter} "
                f"FOLDER --scale {strength:g}`."
            )
    return ""


def about_endings(samples: list[Answered], max_new_tokens: int) -> str:
    """Return the sentence on replies of the adapter that did not end, or ""."""
    base, adapter = (
        sum(not reply.ended for reply in replies)
        for replies in zip(*((one.base, one.adapter) for one in samples), strict=True)
    )
    if not adapter:
        return ""
    return (
        f"replies: {adapter} of {len(samples)} of the adapter's replies did not end within "
        f"{max_new_tokens} tokens (of the base's, {base})."
    )
