"""An adapter with a chat template of its own: the base is measured as it is served, too."""

import contextlib
import shutil
import types

import pytest
import toys
from by_hand import ROUNDING, likeliest_reply, render, reply_loss
from conftest import TOY, as_a_new_process
from records import SHORT, evidence
from runs import read_json, run, talk, write_lines

from inspect_lora.__main__ import main
from inspect_lora.model import vocabulary_of

OTHER = "{% for m in messages %}<|im_start|>{{ m.role }} 2 + 3 = 5\n{{ m.content }}<|im_end|>\n"
OTHER += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant 2 + 3 = 5\n{% endif %}"


def give_template(adapter, template=OTHER):
    """Give an adapter's folder a tokenizer with its own chat template; return that tokenizer."""
    own = toys.AutoTokenizer.from_pretrained(TOY)
    own.chat_template = template
    own.save_pretrained(adapter)
    return own


@pytest.fixture(scope="module")
def found(adapters, tmp_path_factory):
    """Return the records of one command about copies of an adapter, by what template they have."""
    folder = tmp_path_factory.mktemp("templates")
    rows = [{"messages": talk(number, number)} for number in (1, 2, 3)]
    words = ["--eval_file", write_lines(folder / "own.jsonl", rows), *SHORT, "--device", "cpu"]
    words += ["--replies", "3", "--max_new_tokens", "5"]
    copies = {name: shutil.copytree(adapters["plain"], folder / name) for name in NAMES}
    give_template(copies["other"])
    give_template(copies["the same"], toys.tokenizer().chat_template)
    with as_a_new_process(), contextlib.chdir(folder):
        assert run(["evidence", *copies.values(), *words], main) == 0
    return {name: read_json(folder / "inspected" / name / "evidence.json") for name in NAMES}


NAMES = ("none", "other", "the same")


@pytest.fixture
def other_tokenizer(plain):
    return give_template(plain)


def test_the_base_has_losses_by_its_own_template_and_by_the_adapters(found, other_tokenizer):
    for number, line in zip((1, 2, 3), found["other"]["lines"], strict=True):
        by_other, by_own = (
            reply_loss(toys.base_model(), tokenizer, talk(number, number))
            for tokenizer in (other_tokenizer, toys.tokenizer())
        )
        assert line["base"] / line["tokens"] == pytest.approx(by_other, abs=ROUNDING)
        assert line["served_base"] / line["served_tokens"] == pytest.approx(by_own, abs=ROUNDING)
        assert abs(by_other - by_own) > 10 * ROUNDING
    conditions = found["other"]["conditions"]
    assert conditions["template"] != conditions["base_template"] and not conditions["not_served"]


def test_the_base_replies_as_it_is_served_and_in_the_adapters_template(found, other_tokenizer):
    exchanges = found["other"]["exchanges"]
    for exchange in exchanges:
        for name, tokenizer in (("base", toys.tokenizer()), ("base_in_template", other_tokenizer)):
            prompt = render(tokenizer, exchange["messages"], add_generation_prompt=True)
            reply = likeliest_reply(toys.base_model(), prompt, 5)
            expected = tokenizer.decode(reply, skip_special_tokens=True).strip()
            assert exchange[name]["text"] == expected, name
    assert any(each["base"] != each["base_in_template"] for each in exchanges)


def test_two_templates_share_what_was_measured_of_the_base(found):
    own, other = found["none"], found["other"]
    pairs = zip(own["lines"], other["lines"], strict=True)
    assert all(a["base"] == b["served_base"] != b["base"] for a, b in pairs)
    pairs = zip(own["exchanges"], other["exchanges"], strict=True)
    assert all(a["base"] == b["base"] for a, b in pairs)


def test_the_same_template_costs_nothing_and_leaves_no_second_number(found):
    same = found["the same"]
    assert [line["served_base"] for line in same["lines"]] == [None] * 3
    assert all(each["base_in_template"] is None for each in same["exchanges"])
    assert same["conditions"]["template"] == same["conditions"]["base_template"]
    assert same["lines"] == found["none"]["lines"]


def test_replies_are_known_by_their_words_and_tokens_whatever_the_template(found):
    """So adapters with different templates are compared on the same replies."""
    before, after = found["none"]["lines"], found["other"]["lines"]
    assert [line["reply"] for line in before] == [line["reply"] for line in after]
    assert all(one["id"] != other["id"] for one, other in zip(before, after, strict=True))
    assert len({line["reply"] for line in before}) == 3


@pytest.fixture
def measured(capfd, tmp_path):
    def measure(adapter, *words):
        path = write_lines(tmp_path / "own.jsonl", [{"messages": talk(1)}])
        words = ["--eval_file", path, *SHORT, *words]
        return evidence(capfd, adapter, tmp_path / "results", *words)[0]

    return measure


@pytest.mark.parametrize("template", ["", "{{ raise_exception('never') }}"])
def test_a_base_that_cannot_be_served_so_is_told(measured, plain, tmp_path, template):
    """It has no template, or refuses the lines."""
    base = shutil.copytree(TOY, tmp_path / "base")
    tokenizer = toys.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template or None
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(base)
    give_template(plain)
    found = measured(toys.change_config(plain, base_model_name_or_path=str(base)))
    assert found["conditions"]["not_served"] and found["lines"][0]["served_base"] is None


def test_a_flag_is_a_template_of_its_own_too(measured, plain, tmp_path):
    (tmp_path / "own.jinja").write_text(OTHER, encoding="utf-8")
    found = measured(plain, "--chat_template", tmp_path / "own.jinja")
    assert found["lines"][0]["served_base"] is not None


def vocabulary(tokenizer):
    return vocabulary_of(types.SimpleNamespace(tokenizer=tokenizer))


def test_a_token_that_was_added_is_no_other_vocabulary():
    """As for padding."""
    tokenizer = toys.AutoTokenizer.from_pretrained(TOY)
    tokenizer.add_special_tokens({"pad_token": "<|own_pad|>"})
    assert vocabulary(tokenizer) == vocabulary(toys.tokenizer())


def test_exchanged_tokens_are_another_vocabulary(other_tokenizer, plain):
    def exchange(content):
        words = content["model"]["vocab"]
        one, two = [word for word in words if word.isalpha() and len(word) > 3][:2]
        words[one], words[two] = words[two], words[one]

    toys.edit_json(plain / "tokenizer.json", exchange)
    exchanged = toys.AutoTokenizer.from_pretrained(plain)
    assert vocabulary(exchanged) != vocabulary(other_tokenizer) == vocabulary(toys.tokenizer())
