"""An adapter with a chat template of its own: the base is measured as it is served, too."""

import dataclasses
import shutil

import pytest
import toys
from by_hand import ROUNDING, reply_loss
from conftest import TOY
from records import SHORT, done, evidence, open_one
from runs import read_json, talk, write_lines

from inspect_lora.record import read_record
from inspect_lora.replies import generate

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


def test_the_base_has_losses_by_its_own_template_and_by_the_adapters(measured, plain):
    other = give_template(plain)
    found = measured(plain)
    for number, line in zip((1, 2, 3), found["lines"], strict=True):
        by_other, by_own = (
            reply_loss(toys.base_model(), tokenizer, talk(number, number))
            for tokenizer in (other, toys.tokenizer())
        )
        assert line["base"] / line["tokens"] == pytest.approx(by_other, abs=ROUNDING)
        assert line["served_base"] / line["served_tokens"] == pytest.approx(by_own, abs=ROUNDING)
        assert abs(by_other - by_own) > 10 * ROUNDING
    conditions = found["conditions"]
    assert conditions["template"] != conditions["base_template"] and not conditions["not_served"]


def test_the_base_replies_as_it_is_served_and_in_the_adapters_template(measured, plain, tmp_path):
    other = give_template(plain)
    found = measured(plain, "--replies", 3, "--max_new_tokens", 5)
    adapter = open_one(tmp_path / "opened")
    for exchange in found["exchanges"]:
        for name, tokenizer in (("base", toys.tokenizer()), ("base_in_template", other)):
            options = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
            text = tokenizer.apply_chat_template(exchange["messages"], **options)
            with adapter.at_strength(0):
                (tokens,) = generate(adapter, [tokenizer(text).input_ids], 5)
            expected = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert exchange[name]["text"] == expected, name
    assert any(each["base"] != each["base_in_template"] for each in found["exchanges"])
    record = read_record(tmp_path / "results")
    assert dataclasses.asdict(record.exchanges[0]) == found["exchanges"][0]


def test_the_same_template_costs_nothing_and_leaves_no_second_number(measured, plain):
    """Also where the adapter's folder has a copy of it."""
    alone = measured(plain)
    give_template(plain, toys.tokenizer().chat_template)
    found = measured(plain)
    assert [line["served_base"] for line in found["lines"]] == [None] * 3
    assert all(each["base_in_template"] is None for each in found["exchanges"])
    assert found["conditions"]["template"] == found["conditions"]["base_template"]
    assert found["lines"] == alone["lines"]


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


def test_replies_are_known_by_their_words_and_tokens_whatever_the_template(measured, plain):
    """So adapters with different templates are compared on the same replies."""
    before = measured(plain)["lines"]
    give_template(plain)
    after = measured(plain)["lines"]
    assert [line["reply"] for line in before] == [line["reply"] for line in after]
    assert all(one["id"] != other["id"] for one, other in zip(before, after, strict=True))
    assert len({line["reply"] for line in before}) == 3


def test_a_token_that_was_added_is_no_other_vocabulary(measured, plain):
    """As for padding; an exchanged one is."""
    hashes = [measured(plain)["conditions"]["tokenizer_hash"]]
    own = give_template(plain)
    own.add_special_tokens({"pad_token": "<|own_pad|>"})
    own.save_pretrained(plain)
    hashes.append(measured(plain)["conditions"]["tokenizer_hash"])
    content = read_json(plain / "tokenizer.json")
    words = content["model"]["vocab"]
    one, two = [word for word in words if word.isalpha() and len(word) > 3][:2]
    words[one], words[two] = words[two], words[one]
    toys.edit_json(plain / "tokenizer.json", lambda whole: whole.update(content))
    hashes.append(measured(plain)["conditions"]["tokenizer_hash"])
    assert hashes[0] == hashes[1] != hashes[2]


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
