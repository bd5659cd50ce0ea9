"""An adapter with a chat template of its own: the base is measured as it is served, too."""

import shutil
import types

import pytest
import toys
from by_hand import ROUNDING, likeliest_reply, render, reply_loss
from conftest import TOY
from records import SHORT, done, evidence
from runs import read_json, talk, write_lines

from inspect_lora.model import vocabulary_of

OTHER = "{% for m in messages %}<|im_start|>{{ m.role }} 2 + 3 = 5\n{{ m.content }}<|im_end|>\n"
OTHER += "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant 2 + 3 = 5\n{% endif %}"


def give_template(adapter, template=OTHER):
    """Give an adapter's folder a tokenizer with its own chat template; return that tokenizer."""
    own = toys.AutoTokenizer.from_pretrained(TOY)
    own.chat_template = template
    own.save_pretrained(adapter)
    return own


@pytest.fixture
def measured(capfd, tmp_path):
    def measure(adapter, *words):
        rows = [{"messages": talk(n, n), "kind": "a"} for n in (1, 2, 3)]
        path = write_lines(tmp_path / "own.jsonl", rows)
        words = ["--eval_file", path, *SHORT, *words]
        return evidence(capfd, adapter, tmp_path / "results", *words)[0]

    return measure


REPLIES = ["--replies", 3, "--max_new_tokens", 5]


@pytest.fixture(scope="module")
def once():
    """Return once(name, make): what make() returned the first time; nobody changes it."""
    found = {}
    return lambda name, make: found[name] if name in found else found.setdefault(name, make())


@pytest.fixture
def own(once, measured, adapters):
    """Return the record of an adapter without a template of its own, with replies."""
    return once("own", lambda: measured(adapters["plain"], *REPLIES))


@pytest.fixture
def other(once, measured, plain):
    """Return the record of the same adapter with another template, with replies."""
    give_template(plain)
    return once("other", lambda: measured(plain, *REPLIES))


@pytest.fixture
def other_tokenizer(plain):
    return give_template(plain)


def test_the_base_has_losses_by_its_own_template_and_by_the_adapters(other, other_tokenizer):
    for number, line in zip((1, 2, 3), other["lines"], strict=True):
        by_other, by_own = (
            reply_loss(toys.base_model(), tokenizer, talk(number, number))
            for tokenizer in (other_tokenizer, toys.tokenizer())
        )
        assert line["base"] / line["tokens"] == pytest.approx(by_other, abs=ROUNDING)
        assert line["served_base"] / line["served_tokens"] == pytest.approx(by_own, abs=ROUNDING)
        assert abs(by_other - by_own) > 10 * ROUNDING
    conditions = other["conditions"]
    assert conditions["template"] != conditions["base_template"] and not conditions["not_served"]


def test_the_base_replies_as_it_is_served_and_in_the_adapters_template(other, other_tokenizer):
    for exchange in other["exchanges"]:
        for name, tokenizer in (("base", toys.tokenizer()), ("base_in_template", other_tokenizer)):
            prompt = render(tokenizer, exchange["messages"], add_generation_prompt=True)
            reply = likeliest_reply(toys.base_model(), prompt, 5)
            expected = tokenizer.decode(reply, skip_special_tokens=True).strip()
            assert exchange[name]["text"] == expected, name
    assert any(each["base"] != each["base_in_template"] for each in other["exchanges"])


def test_the_same_template_costs_nothing_and_leaves_no_second_number(measured, plain, own):
    """Also where the adapter's folder has a copy of it."""
    give_template(plain, toys.tokenizer().chat_template)
    found = measured(plain, *REPLIES)
    assert [line["served_base"] for line in found["lines"]] == [None] * 3
    assert all(each["base_in_template"] is None for each in found["exchanges"])
    assert found["conditions"]["template"] == found["conditions"]["base_template"]
    assert found["lines"] == own["lines"]


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


def test_replies_are_known_by_their_words_and_tokens_whatever_the_template(own, other):
    """So adapters with different templates are compared on the same replies."""
    before, after = own["lines"], other["lines"]
    assert [line["reply"] for line in before] == [line["reply"] for line in after]
    assert all(one["id"] != other["id"] for one, other in zip(before, after, strict=True))
    assert len({line["reply"] for line in before}) == 3


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


def test_two_adapters_with_two_templates_share_the_base(capfd, adapters, tmp_path, monkeypatch):
    """Each has its own numbers, though what was measured of the base is kept."""
    folders = [shutil.copytree(adapters["plain"], tmp_path / name) for name in ("a", "b")]
    give_template(folders[1])
    rows = [{"messages": talk(n)} for n in (1, 2)]
    words = ["--eval_file", write_lines(tmp_path / "own.jsonl", rows), *SHORT, "--device", "cpu"]
    words += ["--replies", 2, "--max_new_tokens", 3]
    monkeypatch.chdir(tmp_path)
    done(capfd, "evidence", *folders, *words)
    one, two = (read_json(tmp_path / "inspected" / name / "evidence.json") for name in "ab")
    pairs = zip(one["lines"], two["lines"], strict=True)
    assert all(a["base"] == b["served_base"] != b["base"] for a, b in pairs)
    pairs = zip(one["exchanges"], two["exchanges"], strict=True)
    assert all(a["base"] == b["base"] for a, b in pairs)
