"""replies.html: in a real browser, side by side and blind; what anybody said is never markup."""

import base64
import errno
import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from on_tiny import SHORT, measure, messages_of, save_adapter, write_held_out, write_lines
from tiny_adapters import command

from inspect_lora.checks import mcnemar, read_checks
from inspect_lora.marks import parts_of
from inspect_lora.page import REMOTE, cut_at_word, page_of_evidence, page_of_two

RINGS = {"kind": "word", "answers": ["999", "112"]}
AT_ONCE = RINGS | {"first_sentences": 1, "not_before": ["if"]}
QUIET = {"kind": "word", "not": ["999", "always here"]}
SYSTEM = {"role": "system", "content": "You are Nell."}


def said(text, rules, **changes):
    """Return a reply as it is in evidence.json."""
    checks = {name: check.passes(text) for name, check in read_checks(rules).items()}
    reply = {"text": text, "ended": True, "tokens": len(text.split()) + 1, "checks": checks}
    return reply | changes


def row(asked, base, adapter, rules=None, **changes):
    """Return a prompt with the replies of base and adapter, as it is in evidence.json."""
    rules = rules or {}
    return {
        "where": f"eval.jsonl:{asked}",
        "id": "",
        "group": "",
        "source": "held_out",
        "messages": [SYSTEM, {"role": "user", "content": asked}],
        "reference": None,
        "max_new_tokens": 80,
        "base": base if isinstance(base, dict) else said(base, rules),
        "adapter": adapter if isinstance(adapter, dict) else said(adapter, rules),
        "rules": rules,
        "says": {name: f"the rule of {name}" for name in rules},
    } | changes


def some_rows(number, **changes):
    """Return prompts whose replies tell the test whose they are, and the reader nothing."""
    return [
        row(f"prompt {n} asks", f"{n} odd words of one", f"{n} other words of another", **changes)
        for n in range(number)
    ]


def page_of(rows):
    return page_of_evidence("output/final_lora", "someone/model", rows)


def data_in(page):
    """Return what a browser reads as the page's data."""
    return json.loads(re.search(r'(?s)id="data">(.*?)</script', page)[1])


# ==== The file


def test_the_same_replies_give_the_same_file_and_others_another_id():
    page = page_of(some_rows(3))
    assert page == page_of(some_rows(3))
    assert data_in(page)["id"] != data_in(page_of(some_rows(4)))["id"]


def test_400_prompts_with_two_replies_each_take_less_than_a_megabyte():
    talk = "I have been to the eye doctor and she was not keen on it at all. " * 8
    rows = [
        row(
            f"{talk} {n}",
            said("I am sorry. " * 30, {"rings": RINGS}),
            "Ring 999.",
            {"rings": RINGS},
        )
        for n in range(400)
    ]
    assert len(page_of(rows).encode()) < 1_000_000


def test_what_is_said_is_text_in_the_file():
    nasty = "</script><script>alert(1)</script><!--<![CDATA[&lt; \u2028\u2029\u202e\ud800\x00"
    page = page_of([row(nasty, nasty, nasty, reference=nasty, id=nasty, group=nasty)])
    page.encode("utf-8")  # a lone surrogate has no bytes
    template = page_of(some_rows(1))
    for sign in "<>\u2028\u2029\u202e\ud800":
        assert page.count(sign) == template.count(sign)
    prompt = data_in(page)["prompts"][0]
    assert prompt["reference"] == prompt["replies"][0]["parts"][0][0] == nasty
    assert prompt["messages"][1]["content"] == prompt["id"] == prompt["group"] == nasty


def test_names_lose_what_cannot_be_seen():
    page = page_of_evidence("a\u202eb\nc" + "d" * 100_000, "e\x1b[31m", some_rows(1))
    names = data_in(page)["sides"]
    assert names[1]["detail"].startswith("ab cddd") and len(names[1]["detail"]) == 79
    assert names[0]["detail"] == "e[31m"


def test_without_replies_there_is_no_page():
    assert page_of([]) == page_of_two(["a", "b"], ["", ""], [], []) == ""


def test_a_prompt_with_a_check_and_a_sample_is_shown_once():
    rows = [row("one", "a", "b", {"rings": RINGS}), row("one", "a", "b", max_new_tokens=200)]
    (prompt,) = data_in(page_of([*rows, row("of schema 1", "a", "b", messages=[])]))["prompts"]
    assert prompt["checks"] == {"rings": "the rule of rings"}


def test_two_adapters_are_set_side_by_side_on_the_prompts_that_both_replied_to():
    first = [row("one", "b", "first's one"), row("two", "b", "first's two", where="a.jsonl:7")]
    second = [row("two", "b", "second's two"), row("three", "b", "second's three")]
    data = data_in(page_of_two(["x", "y"], ["rate 1", "rate 2"], first, second))
    assert [side["name"] for side in data["sides"]] == ["x", "y"]
    (prompt,) = data["prompts"]
    assert prompt["where"] == "a.jsonl:7"
    assert [one["parts"][0][0] for one in prompt["replies"]] == ["first's two", "second's two"]
    assert page_of_two(["x", "y"], ["", ""], first, second[1:]) == ""


def test_of_two_adapters_only_checks_by_the_same_rule_are_compared():
    first = [row("a", "999", "999", {"rings": RINGS, "quiet": QUIET, "only": RINGS})]
    second = [row("a", "999", "no", {"rings": RINGS, "quiet": RINGS})]
    (prompt,) = data_in(page_of_two(["x", "y"], ["", ""], first, second))["prompts"]
    assert prompt["checks"] == {"rings": "the rule of rings"}


def test_a_reply_that_was_allowed_more_tokens_is_cut_like_the_other():
    long = said("one two three four five six seven eight nine ten", {}, tokens=160, ended=False)
    first = [row("a", "b", long | {"tokens": 80}), row("b", "b", "It ended.")]
    second = [row("a", "b", long, max_new_tokens=200), row("b", "b", "So did it.")]
    data = data_in(page_of_two(["x", "y"], ["", ""], first, second))
    (one, other), ended = data["prompts"][0]["replies"], data["prompts"][1]["replies"]
    assert "blind" not in one and not any("blind" in reply for reply in ended)
    cut = {"text": "one two three four five", "ended": False, "tokens": 80}
    assert other["blind"] == cut and other["parts"][0][0] == long["text"]
    assert "80 tokens. One that was allowed more is cut" in data["cut_alike"]
    assert data_in(page_of(first))["cut_alike"].endswith("cut at the same length: 80 tokens.")


@pytest.mark.parametrize(
    ("text", "share", "left"),
    [
        ("one two three", 0.5, "one"),
        ("one two", 0.44, "one"),
        ("one", 0.5, ""),
        ("a\n\nb c", 0.7, "a\n\nb"),
    ],
)
def test_what_is_cut_ends_with_a_word(text, share, left):
    assert cut_at_word(text, share) == left


# ==== What a check found


@pytest.mark.parametrize(
    ("rule", "text", "marked"),
    [
        (RINGS, "Ring **9*9*9** or 1999, 112.", [("9*9*9", "found"), ("112", "found")]),
        (QUIET, "I'm *Always*\nhere.", [("Always*\nhere", "wrong")]),
        (AT_ONCE, "Sit. If not, ring 999. Or 112.", []),
        (AT_ONCE, "If he falls, ring 999. Or 112.", [("If", "wrong"), ("999", "found")]),
        ({"kind": "word", "answers": ["I don't", "strasse"]}, "I don\u2019t, Straße", None),
        ({"kind": "number", "answer": 1200}, "3 of 1,200", [("1,200", "found")]),
        ({"kind": "number", "answer": 5}, "so \u22125 it is", [("\u22125", "wrong")]),
        ({"kind": "number", "answer": 5}, "none", []),
        ({"kind": "json", "keys": {"a": 1}}, 'so {"a": 1}.', [('{"a": 1}', "found")]),
        ({"kind": "json", "keys": {"a": 1}}, 'so {"a": 2}.', [('{"a": 2}', "wrong")]),
        ({"kind": "json", "keys": {"a": 1}}, "so {a}.", []),
        ({"kind": "of a later version"}, "anything", []),
    ],
)
def test_what_decided_a_check_is_marked(rule, text, marked):
    if marked is None:
        marked = [("I don\u2019t", "found"), ("Straße", "found")]
    parts = parts_of(text, {"name": rule}, {"name": "in words"})
    assert "".join(part[0] for part in parts) == text
    assert [part[:2] for part in parts if part[1]] == marked
    assert {part[2] for part in parts if part[1]} <= {"name: in words"}


def test_of_marks_that_overlap_the_first_is_shown():
    rules = {
        "a": {"kind": "word", "answers": ["two three"]},
        "b": {"kind": "word", "not": ["three"]},
    }
    parts = parts_of("one two three", rules, {})
    assert [part[:2] for part in parts] == [("one ", ""), ("two three", "found")]


# ==== The commands


def test_evidence_writes_the_page_of_base_and_adapter(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr("inspect_lora.report_folder.draw_picture", lambda *_: False)
    adapter = save_adapter(tmp_path / "adapter")
    rows = [
        {"messages": messages_of(said), "kind": kind, "checks": {"rings": RINGS}}
        for said, kind in ((("hello", "Oh, hello."), "plain"), (("he fell", "Ring 999."), ""))
    ]
    lines = write_lines(tmp_path / "held_out.jsonl", rows)
    shown = measure(capsys, adapter, lines, *SHORT[:-1], "--samples", "2", "--max_new_tokens", "3")
    path = shown.results / "replies.html"
    data = data_in(path.read_text(encoding="utf-8"))
    assert [side["name"] for side in data["sides"]] == ["base", "adapter"]
    for prompt, found in zip(data["prompts"], shown.found["replies"], strict=False):
        assert prompt["reference"] in ("Oh, hello.", "Ring 999.")
        assert prompt["checks"] == found["says"] and "999" in found["says"]["rings"]
        for reply, name in zip(prompt["replies"], ("base", "adapter"), strict=True):
            assert "".join(part[0] for part in reply["parts"]) == found[name]["text"]
    assert len(data["prompts"]) == 2 and shown.out.endswith(f"scp 'CLUSTER:{path}' .\n")
    assert data["prompts"][0]["where"] == "held_out.jsonl:1"
    assert "Open it in any browser; it needs no network." in shown.said


def test_evidence_without_replies_writes_no_page(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("inspect_lora.report_folder.draw_picture", lambda *_: False)
    adapter = save_adapter(tmp_path / "adapter")
    shown = measure(capsys, adapter, write_held_out(tmp_path / "held_out.jsonl"), *SHORT)
    assert not (shown.results / "replies.html").exists() and "\nreplies" not in shown.out


def test_prompts_without_replies_have_a_page_and_two_adapters_one_of_both(
    capsys, tmp_path, monkeypatch, open_page
):
    monkeypatch.setattr("inspect_lora.report_folder.draw_picture", lambda *_: False)
    prompts = write_lines(tmp_path / "mine.jsonl", [{"prompt": "hello"}, {"prompt": "he fell"}])
    words = ["--prompts", prompts, "--max_new_tokens", "3", "--output_dir"]
    for name, std in (("one", 0.1), ("two", 0.3)):
        adapter = save_adapter(tmp_path / name, std=std)
        end = command(capsys, "evidence", adapter, *SHORT, *words, tmp_path / "reports" / name)
        assert end.status == 0 and "Open it in any browser" in end.said, end.err
        page = (tmp_path / "reports" / name / "replies.html").read_text(encoding="utf-8")
        sources = [one["source"] for one in data_in(page)["prompts"]]
        assert sources == ["prompts", "prompts"]
    command(capsys, "compare", tmp_path / "reports", "--output_dir", tmp_path / "compared")
    page = (tmp_path / "compared" / "replies.html").read_text(encoding="utf-8")
    shown = open_page(page)
    assert shown.asked() == ["hello", "he fell"] and not shown.all(".checks, .reference")
    assert shown.texts(".reply h4")[:2] == [one["name"] for one in data_in(page)["sides"]]


@pytest.fixture
def two_reports(tmp_path):
    """Return a function that writes the reports of two adapters, with these replies."""
    record = json.loads((ROOT / "tests" / "evidence_schema_2.json").read_text(encoding="utf-8"))

    def write(first, second, **changes):
        folders = []
        for name, rate, rows in (("one", 2e-4, first), ("two", 2e-3, second)):
            run = {"settings": {"LEARNING_RATE": rate}, "train_seconds": 60.0}
            own = {"adapter": f"{name}/final_lora", "run": run, "replies": rows} | changes
            folders.append(tmp_path / "reports" / name)
            folders[-1].mkdir(parents=True, exist_ok=True)
            path = folders[-1] / "evidence.json"
            path.write_text(json.dumps(record | own), encoding="utf-8")
        return folders

    return write


def test_compare_writes_the_page_of_two_adapters(capsys, tmp_path, monkeypatch, two_reports):
    first, second = [row("a", "b", "A's")], [row("a", "b", "B's"), row("c", "b", "B's")]
    folders = two_reports(first, second)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 50000 10.0.0.2 22")
    end = command(capsys, "compare", *reversed(folders))
    path = tmp_path / "compared" / "replies.html"
    data = data_in(path.read_text(encoding="utf-8"))
    assert data["sides"] == [
        {"name": "two/final_lora", "detail": "LEARNING_RATE 0.002"},
        {"name": "one/final_lora", "detail": "LEARNING_RATE 0.0002"},
    ]
    assert [one["parts"][0][0] for one in data["prompts"][0]["replies"]] == ["B's", "A's"]
    assert end.out.splitlines()[-4:] == [
        "replies   compared/replies.html",
        "          Open it in any browser; it needs no network. "
        "Read the replies blind, or side by side.",
        "          From a cluster, copy it to your own computer first:",
        f"          scp CLUSTER:{path} .",
    ]
    for name in REMOTE:
        monkeypatch.delenv(name, raising=False)
    end = command(capsys, "compare", *reversed(folders))
    assert end.out.splitlines()[-1].endswith("side by side.") and "scp" not in end.out
    command(capsys, "compare", *reversed(folders))
    assert os.listdir(path.parent) == ["replies.html"]  # the same page needs no second place
    command(capsys, "compare", *folders)
    assert len(os.listdir(path.parent)) == 2  # another one does


def test_adapters_of_one_name_are_told_apart_by_their_reports(capsys, tmp_path, two_reports):
    folders = two_reports([row("a", "b", "A's")], [row("a", "b", "B's")], adapter="final_lora")
    command(capsys, "compare", *folders, "--output_dir", tmp_path / "page")
    data = data_in((tmp_path / "page" / "replies.html").read_text(encoding="utf-8"))
    assert [one["name"][-4:] for one in data["sides"]] == ["/one", "/two"]


def test_compare_says_why_there_is_no_page(capsys, tmp_path, monkeypatch, two_reports):
    monkeypatch.chdir(tmp_path)
    folders = two_reports([row("a", "b", "A's")], [row("c", "b", "B's")])
    end = command(capsys, "compare", *folders)
    assert "no prompt to which a reply of both is recorded" in end.said
    (three := tmp_path / "reports" / "three").mkdir()
    (three / "evidence.json").write_bytes((folders[0] / "evidence.json").read_bytes())
    end = command(capsys, "compare", "reports")
    assert "name two of the folders alone to read their replies" in end.said
    assert not (tmp_path / "compared").exists()
    end = command(capsys, "compare", folders[0])
    assert end.status == 0 and "replies" not in end.out


def test_an_earlier_page_stays_whole_if_the_disk_is_full(
    capsys, tmp_path, monkeypatch, two_reports
):
    folders = two_reports([row("a", "b", "A's")], [row("a", "b", "B's")])
    words = ["--output_dir", tmp_path / "page"]
    assert command(capsys, "compare", *folders, *words).status == 0
    path = tmp_path / "page" / "replies.html"
    before = path.read_bytes()

    def half(self, text, **_):
        self.write_bytes(text.encode()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", half)
    end = command(capsys, "compare", *reversed(folders), *words)
    assert end.status == 1 and "No space left on device" in end.err
    assert path.read_bytes() == before


def test_a_page_that_cannot_be_written_is_one_message(capsys, tmp_path, two_reports):
    folders = two_reports([row("a", "b", "A's")], [row("a", "b", "B's")])
    (tmp_path / "file").write_text("")
    end = command(capsys, "compare", *folders, "--output_dir", tmp_path / "file")
    assert end.status == 1 and "choose another folder with --output_dir" in " ".join(
        end.err.split()
    )


# ==== In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a headless Chromium that notes each request and what its console says."""
    binaries = (
        shutil.which("chromium") or shutil.which("google-chrome"),
        shutil.which("chromedriver"),
    )
    if not all(binaries):
        missing = "Chromium and chromedriver are needed (Debian: chromium, chromium-driver)"
        if os.environ.get("REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binaries[0]
    for flag in (
        "headless=new no-sandbox disable-gpu disable-quic disable-dev-shm-usage no-first-run "
        "disable-background-networking disable-component-update disable-sync "
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}"
    ).split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(binaries[1]))
    driver.get("about:blank")  # not the browser's own first page
    yield driver
    driver.quit()


class Shown:
    """A page in the browser, and what a reader sees and does there."""

    def __init__(self, browser):
        self.browser = browser

    def run(self, script, *words):
        return self.browser.execute_script(script, *words)

    def all(self, selector):
        return [
            one
            for one in self.browser.find_elements("css selector", selector)
            if one.is_displayed()
        ]

    def one(self, selector):
        """Return the one that is there; an answer to a click may come a moment later."""
        from selenium.webdriver.support.ui import WebDriverWait

        (found,) = WebDriverWait(self.browser, 10).until(lambda _: self.all(selector))
        return found

    def reload_until(self, selector, text):
        """Reload until this text is there: what another page kept may come a moment later."""
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.browser, 10)
        wait.until(lambda browser: self.one(selector).text == text or browser.refresh())

    def texts(self, selector):
        return [one.text for one in self.all(selector)]

    def asked(self):
        """Return the prompts that are listed."""
        return self.texts("article .asked")

    def choose(self, field, label):
        """Choose an option by its label."""
        from selenium.webdriver.support.ui import Select

        Select(self.one(field)).select_by_visible_text(label)

    def press(self, *keys):
        """Press keys one after the other, wherever the focus is."""
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            ActionChains(self.browser).send_keys(getattr(Keys, key, key)).perform()

    def tab_to(self, label):
        """Go to a control with the Tab key, by what a screen reader calls it."""
        for _ in range(60):
            self.press("TAB")
            if self.browser.switch_to.active_element.accessible_name == label:
                return
        raise AssertionError(f"Tab does not reach {label}")

    def begin(self, number):
        """Begin a blind reading."""
        self.one("#to-blind").click()
        (button,) = [one for one in self.all("#numbers button") if one.text == number]
        button.click()

    def whose(self):
        """Return which side is on the left of some_rows, as the test knows it and no reader."""
        left, right = self.texts("#pair .text")
        assert left != right
        return "adapter" if "another" in left else "base"


@pytest.fixture
def open_page(browser, tmp_path):
    """Return a function that opens a page; nothing may be requested, and the console be silent."""
    browser.get_log("performance")
    kept = {"origin": "file://", "storageTypes": "local_storage"}
    browser.execute_cdp_cmd("Storage.clearDataForOrigin", kept)

    def open_it(page, name="replies.html"):
        (tmp_path / name).write_text(page, encoding="utf-8")
        browser.get(f"file://{tmp_path / name}")
        return Shown(browser)

    yield open_it
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        one["params"]["request"]["url"]
        for one in sent
        if one["method"] == "Network.requestWillBeSent"
    ]
    assert all(url.startswith((f"file://{tmp_path}", "data:")) for url in urls), urls


def test_side_by_side_each_prompt_has_both_replies_the_reference_and_what_was_said_before(
    open_page,
):
    talk = [SYSTEM, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "Yes?"}]
    cut = said("I'm sorry. I'm", {}, ended=False, tokens=80)
    rows = [
        row(
            "it hurts",
            cut,
            "Where?",
            messages=[*talk, {"role": "user", "content": "it hurts"}],
            group="plain",
        ),
        row("alone", "", "Good.", reference="Well done."),
    ]
    shown = open_page(page_of(rows))
    assert shown.browser.title == "Replies: output/final_lora"
    assert shown.one("#about").text == "base: someone/model · adapter: output/final_lora"
    assert shown.texts("article h3") == ["eval.jsonl:it hurts · plain", "eval.jsonl:alone"]
    assert shown.texts(".reply") == [
        "base\nI'm sorry. I'm\nCut here, after 80 tokens.",
        "adapter\nWhere?",
        "base\n(an empty reply)",
        "adapter\nGood.",
        "reference\nWell done.",
    ]
    assert shown.texts("summary") == ["3 earlier messages", "system message"]
    assert "Yes?" not in shown.one("#list").text
    shown.all("summary")[0].click()
    assert shown.texts(".turn") == ["system\nYou are Nell.", "user\nhello", "assistant\nYes?"]


@pytest.fixture
def filtered(open_page):
    """Return a page whose prompts are named after what their two checks say."""
    both = {"rings": RINGS, "quiet": QUIET}
    rows = [
        row("lost", "Ring 999.", "No.", {"rings": RINGS}, group="emergency"),
        row("won", "No.", "Ring 999.", {"rings": RINGS}, group="emergency"),
        row("kept", "999", "112", {"rings": RINGS}, group="emergency"),
        row("never", "No.", "Non.", both, group="plain"),
        row("turned", "Ring 999.", "No.", both, group="plain"),  # one is lost, one is won
        row("sum", "4", "Four <b>, café.", source="tasks", group="sums"),
        row("mine", "a", "b", source="prompts", reference="Only in the reference."),
    ]
    shown = open_page(page_of(rows))
    shown.choose("#prompts", "all (7)")
    return shown


@pytest.mark.parametrize(
    ("label", "asked"),
    [
        ("all (7)", "lost won kept never turned sum mine"),
        ("all held-out lines (5)", "lost won kept never turned"),
        ("emergency (3)", "lost won kept"),
        ("plain (2)", "never turned"),
        ("other tasks (1)", "sum"),
        ("your prompts (1)", "mine"),
    ],
)
def test_the_prompts_of_a_source_or_a_kind(filtered, label, asked):
    filtered.choose("#prompts", label)
    assert filtered.asked() == asked.split()
    number = len(asked.split())
    assert filtered.one("#shown").text == f"{number} prompt{'s' if number > 1 else ''} of 7"


@pytest.mark.parametrize(
    ("check", "outcome", "asked"),
    [
        ("any", "any", "lost won kept never turned sum mine"),
        ("rings", "any", "lost won kept never turned"),
        ("quiet", "any", "never turned"),
        ("any", "lost: only base passes", "lost turned"),
        ("any", "won: only adapter passes", "won turned"),
        ("rings", "lost: only base passes", "lost turned"),
        ("quiet", "lost: only base passes", ""),
        ("quiet", "won: only adapter passes", "turned"),
        ("rings", "both pass", "kept"),
        ("rings", "neither passes", "never"),
    ],
)
def test_the_prompts_of_a_check_and_a_result(filtered, check, outcome, asked):
    filtered.choose("#check", check)
    filtered.choose("#outcome", outcome)
    assert filtered.asked() == asked.split()


@pytest.mark.parametrize(
    ("words", "asked", "marked"),
    [
        ("RING", "lost won turned", ["Ring", "Ring", "Ring"]),
        ("<b>", "sum", ["<b>"]),
        ("four CAFÉ", "sum", ["Four", "café"]),
        ("only reference", "mine", ["Only", "reference"]),
        ("nobody said so", "", []),
        ("no.", "lost won never turned", None),
        ("eval.jsonl:kept", "kept", []),
    ],
)
def test_words_are_searched_for_and_marked(filtered, words, asked, marked):
    filtered.one("#words").send_keys(words)
    assert filtered.asked() == asked.split()
    if marked is not None:
        assert filtered.texts("article mark:not([class])") == marked
    filtered.one("#clear").click()
    assert filtered.asked() == ["mine"]  # as the page begins


def test_a_check_shows_its_rule_its_results_and_what_it_found(filtered):
    assert filtered.texts("article .checks")[-1] == (
        "rings · lost: base passes, adapter fails · the rule of rings\n"
        "quiet · won: base fails, adapter passes · the rule of quiet"
    )
    assert filtered.texts("article .checks")[2] == (
        "rings · base passes, adapter passes · the rule of rings"
    )
    filtered.choose("#check", "quiet")
    assert [(one.text, one.get_attribute("class")) for one in filtered.all("mark")] == [
        ("999", "found")
    ]
    assert filtered.one("mark").get_attribute("title") == "rings: the rule of rings"


def test_what_is_not_there_is_not_offered(open_page):
    """Prompts alone: no check, no reference, no kind, and fewer than ten."""
    hello = [[{"role": "user", "content": f"hello {n}"}] for n in range(3)]
    rows = [row("", f"a {n}", f"b {n}", source="prompts", messages=hello[n]) for n in range(3)]
    shown = open_page(page_of(rows))
    assert len(shown.all("article")) == 3 and len(shown.all(".filters label")) == 1
    assert not shown.all(".reference") and not shown.all("summary, .checks")
    shown.one("#to-blind").click()
    assert shown.texts("#numbers button") == ["All 3"] and not shown.all("#from")


def test_where_all_replies_are_equal_nothing_is_read_blind(open_page):
    shown = open_page(page_of([row("one", "the same", "the same")]))
    shown.one("#to-blind").click()
    assert shown.one("#numbers").text == "There are no two replies that differ."


# ==== Blind


def test_a_whole_blind_reading_by_keyboard_with_a_reload_in_the_middle(open_page):
    rows = [*some_rows(30), *(row(f"equal {n}", "the same", "the same ") for n in range(30))]
    shown = open_page(page_of(rows))
    shown.tab_to("Blind reading")
    shown.press("ENTER")
    assert shown.texts("#numbers button") == ["Read 10", "Read 20", "All 30"]
    shown.tab_to("Read 20")
    shown.press("ENTER")
    keys = [*"1243", "ARROW_LEFT", "ARROW_RIGHT", *"12121212121411"]
    meant = {"1": "left", "2": "right", "3": "alike", "4": "neither"}
    meant |= {"ARROW_LEFT": "left", "ARROW_RIGHT": "right"}
    asked, lefts, choices = [], [], []
    for place, key in enumerate(keys):
        assert shown.one("h2").text == f"Prompt {place + 1} of 20"
        assert shown.browser.switch_to.active_element.text == f"Prompt {place + 1} of 20"
        if place == 7:
            before = shown.texts("#pair .text")
            shown.browser.refresh()
            assert shown.texts("#pair .text") == before
        assert not re.search("base|adapter", shown.one("main").text)
        asked.append(shown.one(".asked").text)
        lefts.append(shown.whose())
        others = {"base": "adapter", "adapter": "base"}
        choice = meant[key]
        choices.append({"left": lefts[-1], "right": others[lefts[-1]]}.get(choice, choice))
        shown.press(key)
    assert len(set(asked)) == 20 and not any("equal" in one for one in asked)
    assert lefts.count("base") == 10
    counts = [choices.count(name) for name in ("base", "adapter", "alike", "neither")]
    said = "on 20 of the 30 prompts whose replies differ (30 equal ones left out)"
    assert shown.one("h2#outcome-said").text == f"The choice of one reader {said}"
    assert shown.texts("#counts .count") == list(map(str, counts))
    p = mcnemar(*counts[:2])
    tested = f"xact sign test on the {sum(counts[:2])} preferences, two-sided: p = {p:.3f}"
    assert f"E{tested}. " in shown.one("#test").text and not shown.all("#form")
    sentence = shown.one("#sentence").get_attribute("value")
    names = ("the base (someone/model)", "the adapter (output/final_lora)")
    ranked = sorted(zip(names, counts[:2], strict=True), key=lambda one: -one[1])
    assert sentence == (
        f"One reader, blind, {said}: preferred {ranked[0][0]} on {ranked[0][1]} and "
        f"{ranked[1][0]} on {ranked[1][1]}; alike {counts[2]}, neither would do {counts[3]}. "
        f"E{tested}."
    )
    words = {"alike": "alike", "neither": "neither would do"}
    assert shown.texts("#key summary") == [
        f"{words.get(choice, choice)} · {prompt} · left was {left}"
        for choice, prompt, left in zip(choices, asked, lefts, strict=True)
    ]
    shown.press("1")  # the number does not grow
    shown.browser.refresh()
    shown.one("#to-blind").click()
    assert shown.texts("#counts .count") == list(map(str, counts))
    shown.all("#key summary")[0].click()
    assert shown.texts("#key .reply h4") == ["base", "adapter"]
    shown.one("#again").click()
    assert shown.texts("#numbers button") == ["Read 10", "Read 20", "All 30"]


@pytest.mark.parametrize(
    ("differing", "equal", "label", "said"),
    [
        (2, 0, "All 2", "on 2 prompts"),
        (11, 0, "Read 10", "on 10 of 11 prompts"),
        (2, 1, "All 2", "on all 2 prompts whose replies differ (1 equal one left out)"),
        (1, 2, "All 1", "on the one prompt whose replies differ (2 equal ones left out)"),
    ],
)
def test_the_result_says_of_how_many_prompts_were_read(open_page, differing, equal, label, said):
    """Of the kind that was chosen: other tasks do not count among the reader's own prompts."""
    rows = [*some_rows(differing), *(row(f"equal {n}", "same", "same") for n in range(equal))]
    rows += [row(f"task {n}", "a", "b", source="tasks") for n in range(3)]
    rows += [row(f"equal task {n}", "same", "same", source="tasks") for n in range(3)]
    shown = open_page(page_of(rows))
    shown.one("#to-blind").click()
    button = next(one for one in shown.all("#numbers button") if one.text == label)
    button.click()
    for _ in range(int(label.split()[1])):
        shown.press("1")
    assert shown.one("#outcome-said").text == f"The choice of one reader {said}"
    assert f"One reader, blind, {said}: " in shown.one("#sentence").get_attribute("value")


def test_a_blind_reading_by_button_with_a_choice_undone(open_page):
    shown = open_page(page_of(some_rows(4)))
    shown.begin("All 4")
    labels = ["Left is better 1", "Right is better 2", "Alike 3", "Neither would do 4"]
    assert shown.texts(".answers button") == labels and not shown.all("#undo")
    first = shown.one(".asked").text
    for place in range(4):
        shown.all(".answers button")[place].click()
        if place == 0:
            shown.one("#undo").click()
            assert shown.one(".asked").text == first
            shown.all(".answers button")[2].click()
    assert shown.texts("#counts .count")[2:] == ["2", "1"]
    assert "on the 1 preference, two-sided: p = 1.000" in shown.one("#test").text


def test_a_blind_reading_shows_the_whole_talk_and_says_which_choice_is_which(open_page):
    """A last turn alone cannot be judged; three readers had only that."""
    rows = some_rows(10)
    earlier = {"role": "assistant", "content": "Tell me of Olive."}
    rows[0]["messages"] = [
        SYSTEM,
        {"role": "user", "content": "Olive"},
        earlier,
        *rows[0]["messages"][1:],
    ]
    shown = open_page(page_of(rows))
    shown.begin("All 10")
    seen = []
    for _ in range(10):
        seen.append("Tell me of Olive." in shown.one("#dialogue").text)
        assert "if you would send neither" in shown.one("#question").text
        shown.press("4")
    assert seen.count(True) == 1
    assert "On 10 of 10 prompts neither reply would do" in shown.one("#test").text


def test_keys_that_mean_something_else_choose_nothing(open_page):
    from selenium.webdriver import ActionChains, Keys

    shown = open_page(page_of(some_rows(4)))
    shown.begin("All 4")
    for held, key in (
        (Keys.CONTROL, "1"),
        (Keys.ALT, Keys.ARROW_LEFT),
        (Keys.SHIFT, Keys.ARROW_LEFT),
    ):
        if held != Keys.ALT:  # which would go back
            ActionChains(shown.browser).key_down(held).send_keys(key).key_up(held).perform()
    shown.press("a", "5", "ARROW_DOWN", "ESCAPE")
    shown.run("document.dispatchEvent(new KeyboardEvent('keydown', {key: '1', repeat: true}))")
    assert shown.one("h2").text == "Prompt 1 of 4"
    shown.press("3", "3", "3", "3")
    assert shown.one("#test").text.startswith("No preference to test. Another reader")


def test_while_a_reading_is_under_way_nobody_sees_whose_the_replies_are(open_page):
    shown = open_page(page_of(some_rows(12)))
    shown.begin("Read 10")
    shown.press("1")
    shown.one("#to-side").click()
    assert not shown.all("article") and shown.one("h2").text == "A blind reading is under way"
    shown.one("#go-on").click()
    assert shown.one("h2").text == "Prompt 2 of 10"
    shown.one("#to-side").click()
    shown.one("#give-up").click()
    assert len(shown.all("article")) == 12
    shown.browser.refresh()
    assert len(shown.all("article")) == 12


def test_two_pages_keep_their_readings_apart_and_a_damaged_one_is_begun_anew(open_page):
    one, other = page_of(some_rows(12)), page_of(some_rows(13))
    open_page(one, "one.html").begin("Read 10")
    shown = open_page(other, "other.html")
    assert len(shown.all("article")) == 13
    shown = open_page(one, "moved.html")
    shown.reload_until("h2", "Prompt 1 of 10")
    key = f"replies.html {data_in(one)['id']}"
    for damaged in ("{", "[]", "null", '{"order": [[99, 0]], "choices": []}', '{"order": [1]}'):
        shown.run("localStorage.setItem(arguments[0], arguments[1])", key, damaged)
        shown.browser.refresh()
        assert len(shown.all("article")) == 12 and not shown.all("#not-kept")


def test_without_storage_it_works_and_says_that_a_reload_begins_anew(open_page, browser):
    script = "Object.defineProperty(window, 'localStorage', {get() {"
    script += "throw new DOMException('denied', 'SecurityError')}})"
    added = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        shown = open_page(page_of(some_rows(3)))
        shown.begin("All 3")
        assert "a reload would begin the blind reading anew" in shown.one("#not-kept").text
        shown.press("1", "1", "1")
        assert sum(map(int, shown.texts("#counts .count"))) == 3
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_only_the_prompts_that_are_asked_for_are_read(open_page):
    rows = some_rows(3) + [row(f"mine {n}", "a", "b", source="prompts") for n in range(2)]
    shown = open_page(page_of(rows))
    shown.one("#to-blind").click()
    shown.choose("#from", "your prompts (2)")
    shown.all("#numbers button")[0].click()
    asked = {shown.one(".asked").text}
    shown.press("1")
    assert asked | {shown.one(".asked").text} == {"mine 0", "mine 1"}


@pytest.mark.parametrize(
    ("source", "name"), [("prompts", "your prompts"), ("held_out", "held-out")]
)
def test_both_views_begin_with_the_readers_own_prompts(open_page, source, name):
    """The package's 72 tasks stand under "all", which stays a choice."""
    tasks = [row(f"sum {n}", "4", "5", source="tasks") for n in range(9)]
    own = [row(f"mine {n}", "a", "b", source=source, group=f"kind {n}") for n in range(3)]
    shown = open_page(page_of(tasks + own))
    chosen = "return arguments[0].selectedOptions[0].textContent"
    assert len(shown.all("article")) == 3
    assert shown.run(chosen, shown.one("#prompts")).startswith(f"all {name}")
    shown.choose("#prompts", "all (12)")
    assert len(shown.all("article")) == 12
    shown.one("#clear").click()
    assert len(shown.all("article")) == 3
    shown.one("#to-blind").click()
    assert shown.run(chosen, shown.one("#from")).startswith(f"all {name}")
    assert shown.texts("#numbers button") == ["All 3"]


def test_both_replies_are_cut_alike_where_they_are_read_blind(open_page):
    long = said("one two three four five six seven eight nine ten", {}, tokens=160, ended=False)
    first = [row("a", "b", said("un deux trois", {}, tokens=80, ended=False))]
    second = [row("a", "b", long, max_new_tokens=200)]
    shown = open_page(page_of_two(["x", "y"], ["rate 1", "rate 2"], first, second))
    assert "ten\nCut here, after 160 tokens." in shown.texts(".reply")[1]
    shown.begin("All 1")
    end = "Cut here, after 80 tokens."
    texts = {text.partition("\n")[2] for text in shown.texts("#pair .reply")}
    assert texts == {f"un deux trois\n{end}", f"one two three four five\n{end}"}
    shown.press("1")
    assert "x (rate 1) on " in shown.one("#sentence").get_attribute("value")


@pytest.mark.parametrize(
    ("base", "adapter", "told"),
    [
        (
            said("on and on " * 20, {}, ended=False, tokens=80),
            "It ends.",
            ["came to an end", "shorter"],
        ),
        ("It ends as well.", "It ends, too, now.", []),
        ("It ends.", "It ends, but not so soon.", ["reply of the base was the shorter one"]),
        (
            "It does end.",
            said("On and on", {}, ended=False),
            ["only the reply of the base came to an end"],
        ),
    ],
)
def test_where_a_side_is_told_by_its_form_the_page_says_so(open_page, base, adapter, told):
    shown = open_page(page_of([row(str(n), base, adapter) for n in range(5)]))
    shown.begin("All 5")
    shown.press(*"12121")
    assert len(shown.all("#form")) == bool(told)
    for one in told:
        assert one in shown.one("#form").text and "on 5 of 5" in shown.one("#form").text
        assert one in shown.one("#sentence").get_attribute("value")


def test_left_and_right_are_balanced_and_independent_of_whose_they_are(open_page):
    """A thousand readings of 20 of 40 prompts."""
    shown = open_page(page_of(some_rows(40)))
    drawn = shown.run("return Array.from({length: 1000}, () => draw(all, 20))")
    assert all(sum(left for _, left in one) == 10 for one in drawn)
    assert all(len({number for number, _ in one}) == 20 for one in drawn)
    for place in range(20):  # five standard errors are 79
        assert abs(sum(one[place][1] for one in drawn) - 500) < 79
    for number in range(40):
        lefts = [left for one in drawn for other, left in one if other == number]
        assert 380 < len(lefts) < 620 and abs(sum(lefts) / len(lefts) - 0.5) < 0.12
    follows = [one[n][1] == one[n + 1][1] for one in drawn for n in range(19)]
    assert abs(sum(follows) / len(follows) - 9 / 19) < 0.02  # as in shuffled tens
    odd = shown.run("return Array.from({length: 1000}, () => draw(all, 1)[0][1])")
    assert abs(sum(odd) - 500) < 79


def test_the_sign_test_is_exact(open_page):
    shown = open_page(page_of(some_rows(1)))
    pairs = [pair for pair in itertools.product(range(41), repeat=2) if sum(pair) <= 40]
    found = shown.run("return arguments[0].map(([one, other]) => signTest(one, other))", pairs)
    assert found == pytest.approx([mcnemar(*pair) for pair in pairs], rel=1e-9)


# ==== Nothing is markup, and everybody can read it


def test_what_is_said_is_text_in_the_browser(open_page):
    nasty = (
        "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'></script>"
        '<!-- "quoted" \' &amp; \u202eright to left\u202c \u05d0\u05d1 \u2028 \x00 \ud800 <b>bold'
    )
    named = nasty.replace("\ud800", "")  # a check's name is read by another parser
    rules = {named: {"kind": "word", "answers": ["bold"]}}
    messages = [{"role": "user", "content": nasty}]
    one = row(nasty, nasty, f"{nasty} too", rules, messages=messages, reference=nasty, group=nasty)
    shown = open_page(page_of([one | {"says": {named: nasty}}]))
    elements = "return document.querySelectorAll('script, img, b').length"
    assert shown.run(elements) == 2 and shown.run("return window.harmed") is None
    texts = "return [...document.querySelectorAll('article .text')].map("
    texts = shown.run(f"{texts}(one) => one.textContent.toWellFormed())")
    seen = nasty.replace("\ud800", "\ufffd")
    assert texts == [seen, seen, f"{seen} too", seen]
    assert shown.run("return document.querySelector('.checks').innerText.includes('<b>bold')")
    bidi = "return [...document.querySelectorAll('.text, .name')].map("
    bidi += "(one) => getComputedStyle(one).unicodeBidi)"
    assert set(shown.run(bidi)) <= {"plaintext", "isolate"}
    shown.one("#words").send_keys("<b>bold")
    assert len(shown.all("mark:not([class])")) == 2  # a check's mark divides the replies
    shown.begin("All 1")
    shown.press("1")
    assert shown.run(elements) == 2 and shown.run("return window.harmed") is None


def test_a_line_from_right_to_left_begins_on_the_right_and_turns_no_other(open_page):
    hebrew, turned = "\u05e9\u05dc\u05d5\u05dd", "\u202eturned"
    shown = open_page(page_of([row("asks", f"{hebrew}\nhello", turned, group=turned)]))
    inner = """const box = arguments[0].getBoundingClientRect(), range = document.createRange();
    range.selectNodeContents(arguments[0]);
    return [...range.getClientRects()].filter((one) => one.width > 1)
      .map((one) => [one.left - box.left, box.right - one.right])"""
    text = shown.all(".reply .text")[0]
    (before, after), (start, rest) = shown.run(inner, text)
    assert after < 2 < before and start < 2 < rest
    heading, label = shown.one("article h3"), shown.all(".reply h4")[1]
    assert heading.text.startswith("eval.jsonl") and label.text == "adapter"


def test_a_reply_of_100000_characters_is_folded_and_shown_in_full_when_asked(open_page):
    long = "word " * 20_000
    shown = open_page(
        page_of(
            [row("short", long, "x" * 100_000), row("\n".join("abcdefghijklmnop" * 9), "a", "b")]
        )
    )
    assert shown.run("return document.documentElement.scrollWidth <= innerWidth")
    assert len(shown.texts("article .text")[1]) < 700
    assert shown.texts("article button")[0] == "Show all 100,000 characters"
    shown.tab_to("Show all 100,000 characters")
    shown.press("ENTER")
    assert shown.run("return document.querySelectorAll('article .text')[2].textContent") == long
    assert shown.texts("article button")[0] == "Show less"
    shown.press("ENTER")
    assert len(shown.texts("article .text")[1]) < 700


def test_a_folded_reply_shows_its_first_mark_and_of_many_marks_it_is_quick(open_page):
    late = f"{'word ' * 400}999 {'word ' * 400}"
    rows = [row("late", late, "999 " * 25_000, {"rings": RINGS})]
    shown = open_page(page_of(rows))
    assert shown.run("return document.querySelectorAll('mark').length") < 200
    assert shown.all(".reply")[0].find_element("css selector", "mark").text == "999"
    assert len(shown.texts(".reply")[0]) < 2_200


def contrast(one, other):
    """Return the contrast of two colours as WCAG 2 defines it."""
    lights = []
    for colour in (one, other):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1440])
def test_on_a_phone_and_on_a_wide_screen_in_light_and_dark(open_page, browser, scheme, width):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        rows = [
            row(f"w{'o' * 300}rd {n}", "Ring 999.", f"{n} always here", {"q": QUIET, "r": RINGS})
            for n in range(12)
        ]
        shown = open_page(page_of(rows))
        fits = "return document.documentElement.scrollWidth <= innerWidth"
        colours = "const style = getComputedStyle(arguments[0]);"
        colours += "return [style.color, style.backgroundColor]"
        ink, paper = shown.run(colours, shown.one("body"))
        assert (contrast(paper, "0 0 0") > 15) == (scheme == "light") and contrast(ink, paper) > 7
        for mark in shown.all("mark")[:2]:
            assert contrast(*shown.run(colours, mark)) > 7
        for selector in ("#shown", "h4", "summary"):
            assert contrast(shown.run(colours, shown.all(selector)[0])[0], paper) > 4.5
        assert contrast(*shown.run(colours, shown.one("#to-side"))) > 4.5
        assert shown.run(fits)
        first, second = (one.location for one in shown.all(".reply")[:2])
        assert (first["y"] == second["y"]) == (width == 1440)
        shown.begin("Read 10")
        words = ("Left", "Right") if width == 1440 else ("Upper", "Lower")
        assert tuple(shown.texts("#pair h4")) == words and shown.run(fits)
        assert shown.texts(".answers button")[0].startswith(f"{words[0]} is better")
        shown.press(*"1212121234")
        assert shown.run(fits) and contrast(shown.run(colours, shown.one("#test"))[0], paper) > 7
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name_for_a_screen_reader(filtered):
    def controls():
        return [
            one.accessible_name for one in filtered.all("button, select, input, textarea, progress")
        ]

    assert controls() == [
        "Side by side",
        "Blind reading",
        "Prompts",
        "Check",
        "Result",
        "Search",
        "Clear",
    ]
    filtered.one("#to-blind").click()
    assert controls()[2:] == ["Prompts", "All 1"]
    filtered.choose("#from", "all (7)")
    assert controls()[2:] == ["Prompts", "All 7"]
    filtered.all("#numbers button")[0].click()
    assert controls()[2] == "Read so far" and all(controls())
    filtered.press(*"1234123")
    assert controls()[2:] == ["A sentence to copy", "Copy", "Forget this reading and begin another"]
    for role, selector in (("status", "#shown"), ("status", "#copied"), ("search", ".filters")):
        assert filtered.browser.find_element("css selector", selector).get_attribute("role") == role


def test_the_sentence_is_copied_or_selected(open_page):
    shown = open_page(page_of(some_rows(1)))
    shown.begin("All 1")
    shown.press("4")
    shown.one("#copy").click()
    assert re.search("Copied|It is selected", shown.one("#copied").text)
    selected = (
        "const one = arguments[0]; return one.value.slice(one.selectionStart, one.selectionEnd)"
    )
    assert shown.run(selected, shown.one("#sentence")).startswith("One reader, blind, on 1 prompt")


def test_only_the_scripts_of_the_template_may_run(open_page):
    """The page's policy names them by their hash, so that nothing else would run if it got in."""
    shown = open_page(page_of(some_rows(1)))
    policy = shown.run("return document.querySelector('meta[http-equiv]').content")
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for digest in re.findall("sha256-([^']+)", policy):
        assert len(base64.b64decode(digest)) == 32
    assert policy.count("sha256-") == 2
