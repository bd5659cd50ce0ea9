"""What is counted of an adapter: KL, updates, parts; and that measuring leaves it as it was."""

import math
from types import SimpleNamespace

import pytest
import torch
import toys
from by_hand import ROUNDING, MergedByHand, render
from conftest import TOY
from records import planned, write_talks_with
from runs import replace_ours, write_lines

from inspect_lora import measures, model, replies
from inspect_lora.plan import Asked
from inspect_lora.record import Prompt
from train_lora.losses import losses_of_replies, reply_logits
from train_lora.tokens import Example

PIRATE = [{"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "ahoy"}]
TASKS = [[{"role": "user", "content": "hello"}], PIRATE, [{"role": "user", "content": "2 + 3?"}]]
PROMPTS = [Prompt("tasks", f"tasks:{n}", "", one) for n, one in enumerate(TASKS)]


def shifts_of(adapter):
    asked = [Asked(one, model.prompt_ids(one.messages, adapter.base)) for one in PROMPTS]
    return measures.drift(SimpleNamespace(tasks=asked), adapter)["shifts"]


SAID = [[40, 50, 60, 2], [70, 80], list(range(100, 140))]  # tokens of the base's replies


def test_kl_and_other_tokens_are_those_of_merged_weights(opened, tokenizer, monkeypatch):
    """A task with a system message of its own keeps that."""
    asked = []
    opened.loaded.known.clear()
    say = lambda _, prompts, *__, **___: asked.extend(prompts) or SAID  # noqa: E731
    monkeypatch.setattr(measures, "generate", say)
    found = shifts_of(opened)
    prompts = [render(tokenizer, one, add_generation_prompt=True) for one in TASKS]
    assert asked == prompts
    assert [one.strength for one in found] == [0.5, 0.75, 1.0, 1.5]
    tensors = opened.saved.folder / toys.TENSORS
    merged = MergedByHand(TOY, tensors, lambda _: toys.PLAIN_SCALE)

    def chances(strength):
        pairs = zip(prompts, SAID, strict=True)
        logits = [merged.logits(a + b, strength)[len(a) - 1 : -1] for a, b in pairs]
        return [one.double().log_softmax(-1) for one in logits]

    base = chances(0)
    for shift in found:
        moved = chances(shift.strength)
        pairs = list(zip(base, moved, strict=True))
        kl = [(one.exp() * (one - other)).sum().item() for one, other in pairs]
        assert shift.kl == pytest.approx(kl, abs=ROUNDING * 40)
        others = [(one.argmax(-1) != other.argmax(-1)).sum().item() for one, other in pairs]
        assert shift.changed_tokens == others
        assert shift.tokens == [4, 2, 40]
    assert sum(found[-1].changed_tokens) and min(found[-1].kl) > 0.01


def at_most(strength, real):
    """Return a function of a model that gives NaN where the update is stronger than this."""

    def measure(network, *given):
        (scale, *_) = (one.scaling["default"] for one in toys.layers_of(network).values())
        found = real(network, *given)
        if scale <= strength * toys.PLAIN_SCALE:
            return found
        return found * math.nan if torch.is_tensor(found) else [[math.nan]] * len(found)

    return measure


def test_a_strength_that_gives_nan_is_left_out_and_the_rest_is_measured(opened, monkeypatch, capfd):
    """As x 1.5 in scaled float16; NaN as trained leaves nothing to compare."""
    monkeypatch.setattr(measures, "generate", lambda *_, **__: SAID)
    real = losses_of_replies, reply_logits
    example = Example("a:1", TASKS[0], {}, [40, 50], [60, 2])
    held_out = [SimpleNamespace(example=example)]
    plan = SimpleNamespace(held_out=held_out, part_lines=[0])
    for most, strengths in ((1, [0.5, 0.75, 1.0]), (0.75, [])):
        opened.loaded.known.clear()
        replace_ours(monkeypatch, "losses_of_replies", at_most(most, real[0]))
        replace_ours(monkeypatch, "reply_logits", at_most(most, real[1]))
        assert [shift.strength for shift in shifts_of(opened)] == strengths
        parts = measures.parts(plan, opened)["parts"]
        names = [part.name for part in parts if part.family == "strength"]
        assert names == [f"x {strength:g}" for strength in (0.5, 0.75)]
        assert "1.5" in capfd.readouterr().out
    opened.loaded.known.clear()


def test_a_word_that_the_base_never_says_adds_nothing_to_kl(opened, monkeypatch):
    """As padding of the vocabulary, whose logits some models set to minus infinity."""
    monkeypatch.setattr(measures, "generate", lambda *_, **__: SAID)
    opened.loaded.known.clear()
    expected, real = shifts_of(opened), reply_logits

    def without_padding(*given):
        logits = real(*given)
        return torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], 1)

    replace_ours(monkeypatch, "reply_logits", without_padding)
    found = shifts_of(opened)
    opened.loaded.known.clear()
    for shift, other in zip(found, expected, strict=True):
        assert shift.kl == pytest.approx(other.kl, abs=1e-6)


def test_the_same_replies_have_the_same_hash_and_others_another(opened, monkeypatch):
    """KL on other replies of the base is not compared."""
    hashes = []
    for said in (SAID, SAID, [[40], *SAID[1:]]):
        monkeypatch.setattr(measures, "generate", lambda *_, said=said, **__: said)
        opened.loaded.known.clear()
        hashes += {one.replies for one in shifts_of(opened)}
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_base_replies_to_tasks_with_its_own_odds(opened, monkeypatch):
    """Its own settings, such as min_p, or top_k 50 by default, would make the likely likelier."""
    rows = 400
    monkeypatch.setattr(replies, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(replies, "TOKENS_AT_ONCE", 10**9)
    ids = model.prompt_ids(TASKS[0], opened.base)
    with opened.at_strength(0):
        drawn = [one for (one,) in replies.generate(opened, [ids] * rows, 1, sampled=True)]
        with torch.no_grad():
            chances = opened.model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)
    counts = torch.bincount(torch.tensor(drawn), minlength=len(chances)) / rows
    likely = chances.argsort(descending=True)
    for places in (likely[:1], likely[1:10], likely[10:50], likely[50:]):
        share = chances[places].sum().item()
        assert share > 0.01
        error = (share * (1 - share) / rows) ** 0.5
        assert abs(counts[places].sum().item() - share) < 4 * error


def test_the_adapter_is_to_the_bit_what_it_was_after_an_error_in_a_part(opened):
    def state():
        layers = opened.layers.values()
        how = [(one.scaling["default"], one.disable_adapters) for one in layers]
        return how, {name: one.clone() for name, one in opened.model.state_dict().items()}

    before, weights = state()
    families = set()
    for family, *_, change in list(measures.parts_of(opened)):
        families.add(family)
        with pytest.raises(KeyError), change:
            raise KeyError
    assert families == {"strength", "removed", "alone", "cut"}
    after, weights_after = state()
    assert before == after and weights.keys() == weights_after.keys()
    assert all(weights[name].equal(one) for name, one in weights_after.items())


def test_parts_and_tasks_are_measured_on_the_same_lines_each_time(opened, tmp_path):
    """So that two adapters can be compared; part_lines says which lines a part's losses are of."""
    path = write_talks_with(tmp_path / "eval.jsonl", *range(4))
    tasks = write_lines(tmp_path / "tasks.jsonl", [{"prompt": f"{n} + 3?"} for n in range(9)])
    words = [opened.saved.folder, "--eval_file", path, "--general_file", tasks, "--replies", 0]
    one, again = (planned(*words, "--parts", 2, "--tasks", 2) for _ in range(2))
    assert one.part_lines == again.part_lines and len(set(one.part_lines)) == 2
    assert one.tasks == again.tasks and len({task.prompt.where for task in one.tasks}) == 2
    some = measures.parts(one, opened)
    whole = measures.parts(planned(*words, "--parts", 4), opened)
    assert some["part_lines"] == one.part_lines and whole["part_lines"] == [*range(4)]
    for part, of_all in zip(some["parts"], whole["parts"], strict=True):
        expected = [of_all.losses[number] for number in one.part_lines]
        assert part.losses == pytest.approx(expected, rel=1e-5), part.name
