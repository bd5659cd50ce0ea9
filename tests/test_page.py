"""replies.html in a real Chromium: what a reader sees and does; nothing leaves the page."""

import json
import os
import re
import shutil
import time

import pytest
import scipy.stats
from made_records import BRIEF, SYSTEM, asked, made, put, said
from runs import command
from selenium import webdriver
from selenium.webdriver.support.ui import Select

from inspect_lora.__main__ import main
from inspect_lora.page import Side, page_of, prompt_id, prompts_of, reply_id

SIDES = [Side("base", "someone/model", "base"), Side("adapter", "output/final_lora", "12ab")]
FLAGS = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "no-first-run")


@pytest.fixture(scope="module")
def browser():
    """Return a headless Chromium that notes each request, and what its console says."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        missing = "Chromium and chromedriver are needed (Debian: chromium, chromium-driver)"
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    browser.get("about:blank")
    yield browser
    browser.quit()


class Shown:
    def __init__(self, browser):
        self.browser, self.run = browser, browser.execute_script

    def all(self, selector, what="one"):
        """Return the elements that are seen, or something of each."""
        seen = "[...document.querySelectorAll(arguments[0])].filter((one) => one.checkVisibility())"
        return self.run(f"return {seen}.map((one) => {what})", selector)

    def texts(self, selector):
        return self.all(selector, "one.textContent.trim()")

    def press(self, *keys):
        """Press keys one after the other, wherever the focus is."""
        for key in keys:
            key = getattr(webdriver.Keys, key, key)
            webdriver.ActionChains(self.browser).send_keys(key).perform()

    def start(self, sides=()):
        """Begin to read blind all prompts, of the two sides if there are more."""
        self.all("#to-blind")[0].click()
        for field, name in zip(("first", "second"), sides, strict=False):
            Select(self.all(f"#{field}")[0]).select_by_visible_text(name)
        self.all("#numbers button")[-1].click()

    def is_guarded(self):
        """Return whether the browser would ask before it closes the page."""
        event = "new Event('beforeunload', {cancelable: true})"
        return self.run(f"return !window.dispatchEvent({event})")

    def saved(self, folder, reader=""):
        """Save the reading; return the file's name and what it holds."""
        self.browser.execute_cdp_cmd(
            "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)}
        )
        self.all("#reader")[0].send_keys(reader)
        self.all("#save button")[0].click()
        for _ in range(100):
            for path in folder.glob("reading*.json"):
                if content := path.read_bytes():  # empty until the download is done
                    return path.name, json.loads(content)
            time.sleep(0.1)
        raise AssertionError("no file")

    def tab_to(self, label):
        for _ in range(30):
            self.press("TAB")
            if self.run("return document.activeElement.textContent.trim()") == label:
                return
        raise AssertionError(label)


@pytest.fixture
def open_page(browser, tmp_path):
    """Return a function that opens a page; nothing may be requested, and the console be silent."""
    browser.get_log("performance")

    def open_it(exchanges, sides=SIDES, system=SYSTEM, others=()):
        """Others are further replies to each prompt, of as many further sides."""
        path = tmp_path / "replies.html"
        prompts = prompts_of(exchanges)
        for prompt in prompts:
            prompt.replies.extend(others)
        path.write_text(page_of(sides, system, prompts), encoding="utf-8")
        browser.get(f"file://{path}")
        return Shown(browser)

    yield open_it
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in sent
            if one["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert urls and all(url.startswith((f"file://{tmp_path}", "data:", "blob:")) for url in urls)


def test_side_by_side(open_page):
    """What was said before, the bad reply and the rule are folded."""
    earlier = [("system", SYSTEM), ("user", "hello"), ("assistant", "Yes?"), ("user", "it hurts")]
    messages = [{"role": role, "content": content} for role, content in earlier]
    empty = {"adapter": said("", {"is brief": False}), "reference": None}
    shown = open_page([asked(1, messages=messages, rejected="the bad one"), asked(2, **empty)])
    replies = ["of the base 1", "of the adapter 1", "reference 1", "of the base 2"]
    assert shown.texts(".reply .text") == replies  # the empty one is told otherwise
    assert shown.texts(".reply h3") == ["base", "adapter", "reference", "base", "adapter"]
    cut = ["4 tokens" in box for box in shown.texts(".reply")]
    assert cut == [True, False, False, True, False]
    passed = shown.all(".checks li", "one.className")
    assert passed == ["won", "won", "won", "lost"]  # base and adapter, twice
    assert not shown.texts(".turn .text, .rules dd")
    for folded in shown.all("article summary"):
        folded.click()
    assert shown.texts(".turn .text") == ["hello", "Yes?"]
    assert shown.texts(".reference details .text") == ["the bad one"]
    assert shown.texts(".rules dd") == ["most words: 40"] * 2


def test_filters_by_source_kind_check_result_and_words(open_page):
    """Each prompt is named after what its check says of base and adapter."""
    rows = []
    for number, name in enumerate(("lost", "won", "kept", "never")):
        passes = {"before": name in ("lost", "kept"), "after": name in ("won", "kept")}
        message = [{"role": "user", "content": name}]
        rows.append(asked(number, name="rings", messages=message, **passes))
    for name in ("tasks", "prompts"):
        message = [{"role": "user", "content": name}]
        rows.append(asked(0, source=name, messages=message, reference="Café <b>"))
    shown = open_page(rows)
    assert shown.texts(".asked") == ["prompts"]  # the reader's own come first
    for field, label, expected in (
        ("prompts", "other tasks (1)", "tasks"),
        ("prompts", "held-out lines: all (2)", "lost never"),
        ("prompts", "held-out lines (4)", "lost won kept never"),
        ("outcome", "lost: only base passes", "lost"),
        ("outcome", "won: only adapter passes", "won"),
        ("outcome", "none passes", "never"),
        ("outcome", "all pass", "kept"),
        ("check", "is brief", ""),
        ("prompts", "all (6)", "tasks prompts"),
    ):
        Select(shown.all(f"#{field}")[0]).select_by_visible_text(label)
        assert shown.texts(".asked") == expected.split(), label
    shown.all("#words")[0].send_keys("CAFÉ <B> task")
    assert shown.texts(".asked") == ["tasks"]


def test_a_whole_blind_reading_by_keyboard(open_page):
    equal = {"base": said("the same"), "adapter": said("the same "), "checks": {}}
    shown = open_page([*map(asked, range(30)), *(asked(n, **equal) for n in range(30, 60))])
    shown.tab_to("Blind reading")
    shown.press("ENTER")
    shown.tab_to("Read 20")
    shown.press("ENTER")
    seen, sides, choices = [], [], []
    for place, key in enumerate("1234" + "1" * 14 + "23"):
        said_of_both = " ".join(shown.texts("main h2, main h3, .answers, .asked"))
        assert not re.search("base|adapter", said_of_both) and not shown.all("#to-side:enabled")
        seen.append(shown.texts(".asked")[0])
        a, b = shown.texts("#pair .text")
        assert "4 tokens" not in " ".join(shown.texts("#pair"))  # after which the base is cut
        sides.append("base" if "base" in a else "adapter")
        assert a != b
        other = {"base": "adapter", "adapter": "base"}[sides[-1]]
        choices.append({"1": sides[-1], "2": other, "3": "alike", "4": "neither"}[key])
        if place == 3:  # a choice is taken back
            shown.press("1", "u")
            assert shown.texts(".asked") == seen[-1:]
        shown.press(key)
    assert len(set(seen)) == 20 and sides.count("base") == 10
    counts = [choices.count(name) for name in ("base", "adapter", "alike", "neither")]
    assert shown.texts("#counts td:last-child") == list(map(str, counts))
    shown.press("1")  # it is over
    lines = shown.texts("#key summary")
    for line, choice, prompt, side in zip(lines, choices, seen, sides, strict=True):
        assert line.startswith(choice) and prompt in line and line.endswith(side)


def test_lines_with_the_same_messages_are_read_once(open_page):
    """A saved reading names a prompt by its messages."""
    rows = [asked(number) for number in range(3)]
    rows += [asked(number, where="eval.jsonl:9", kind="another") for number in range(2)]
    shown = open_page(rows)
    shown.start()
    shown.press("1", "1", "1")
    assert shown.all("#result") and len(shown.texts("#key summary")) == 3


def test_sides_are_balanced_and_independent_of_the_line(open_page):
    """A thousand readings of 20 of 40 prompts; five standard errors."""
    shown = open_page([asked(number) for number in range(40)])
    drawn = shown.run("return Array.from({length: 1000}, () => draw(all, 20, [1, 0]))")
    assert all({a, b} == {0, 1} for one in drawn for _, a, b in one)
    drawn = [[(number, a) for number, a, _ in one] for one in drawn]
    assert all(sum(side for _, side in one) == 10 for one in drawn)
    assert all(len({number for number, _ in one}) == 20 for one in drawn)
    for place in range(20):
        assert abs(sum(one[place][1] for one in drawn) - 500) < 79
    for number in range(40):
        sides = [side for one in drawn for other, side in one if other == number]
        assert 420 < len(sides) < 580 and abs(sum(sides) / len(sides) - 0.5) < 0.12
    follows = [one[n][1] == one[n + 1][1] for one in drawn for n in range(19)]
    assert abs(sum(follows) / len(follows) - 9 / 19) < 0.02  # as in shuffled tens
    odd = shown.run("return Array.from({length: 1000}, () => draw(all, 1, [0, 1])[0][1])")
    assert abs(sum(odd) - 500) < 79


COUNTS = [(0, 6), (1, 1), (9, 2), (600, 600), (2000, 1500)]


@pytest.mark.parametrize(("one", "other"), COUNTS)
def test_mid_p_and_wilsons_interval_are_scipys(open_page, one, other):
    shown = open_page([asked(0)])
    fewer, coin = min(one, other), scipy.stats.binom(one + other, 0.5)
    mid_p = min(1, 2 * coin.cdf(fewer) - coin.pmf(fewer))
    assert shown.run("return signTest(...arguments)", one, other) == pytest.approx(mid_p, rel=1e-9)
    interval = scipy.stats.binomtest(one, one + other).proportion_ci(method="wilson")
    wilson = shown.run("return wilson(...arguments)", one, other)
    assert wilson == pytest.approx(list(interval), rel=1e-9, abs=1e-12)


NAMES = ("base", "adapter", "second")


@pytest.mark.parametrize(
    ("sides", "keys", "finished"),
    [(("base", "adapter"), "123412", True), (("second", "base"), "2143", False)],
)
def test_the_saved_reading_is_what_was_chosen(open_page, tmp_path, sides, keys, finished):
    exchanges = [asked(number) for number in range(6)]
    others = [said("of the second")]
    ids = {"base": "base", "adapter": "12ab", "second": "2"}
    shown = open_page(exchanges, [Side(name, "", ids[name]) for name in NAMES], others=others)
    shown.start(sides)
    asked_of = {prompt.messages[-1]["content"]: prompt for prompt in exchanges}
    expected = []
    for key in keys:
        exchange = asked_of[shown.texts(".asked")[0]]
        texts = {"base": exchange.base.text, "adapter": exchange.adapter.text}
        texts |= {"second": "of the second"}
        first, then = [
            [texts[name] for name in sides].index(one) for one in shown.texts("#pair .text")
        ]
        replies = [reply_id(said(texts[name])) for name in sides]
        choice = {"1": first, "2": then, "3": "alike", "4": "neither"}[key]
        row = {"prompt": prompt_id(exchange), "replies": replies, "first": first}
        expected.append(row | {"choice": choice})
        shown.press(key)
    if not finished:
        shown.all("#stop")[0].click()
    name, reading = shown.saved(tmp_path, "Zoë of /ward 3")
    assert name == "reading-Zoë-of-ward-3.json"
    facts = {"schema": 1, "reader": "Zoë of /ward 3", "finished": finished}
    assert reading == facts | {"sides": [ids[name] for name in sides], "choices": expected}


def test_a_saved_reading_goes_into_the_report(capsys, browser, tmp_path):
    """From the page that `report` wrote, through the browser, and back."""
    stored = put(made(tmp_path / "report", exchanges=[asked(number) for number in range(9)]))
    assert command(capsys, ["report", stored.folder], main).status == 0
    browser.get(f"file://{stored.folder}/replies.html")
    shown = Shown(browser)
    shown.start()
    adapter = 0
    for _ in range(9):
        adapter += "adapter" in shown.texts("#pair .text")[0]
        shown.press("1")
    name, _ = shown.saved(tmp_path, "Ann")
    words = ["report", stored.folder, "--json", "--reading", tmp_path / name]
    (reading,) = json.loads(command(capsys, words, main).out)["readings"]
    (whole, *_) = reading["preferences"]
    assert (whole["first"], whole["second"]) == (9 - adapter, adapter)


@pytest.mark.parametrize("choices", [0, 1, 3])
def test_a_reading_is_guarded_from_its_first_choice_until_it_is_saved(open_page, tmp_path, choices):
    """Three are all that there are."""
    shown = open_page([asked(number) for number in range(3)])
    shown.start()
    assert not shown.is_guarded()
    shown.press(*"1" * choices)
    assert shown.is_guarded() is (choices > 0)
    if choices < 3:
        shown.all("#stop")[0].click()
    assert bool(shown.all("#result")) is shown.is_guarded() is (choices > 0)
    if choices == 3:
        shown.saved(tmp_path)
    for discard in shown.all("#again"):
        discard.click()
    assert shown.all("#start") and not shown.is_guarded()


def test_outcomes_are_filtered_for_each_of_several_adapters(open_page):
    sides = [*SIDES, Side("second", "", "2"), Side("third", "", "3")]
    others = [said("of the second", {"is brief": False}), said("of the third", {"is brief": True})]
    shown = open_page([asked(number) for number in range(6)], sides, others=others)
    assert shown.texts(".reply h3")[:5] == ["base", "adapter", "second", "third", "reference"]
    Select(shown.all("#outcome")[0]).select_by_index(4)  # the third passes, and not all do
    assert len(shown.texts("article")) == 6
    Select(shown.all("#outcome")[0]).select_by_index(3)  # the second never passes
    assert not shown.texts("article")


def test_whatever_is_said_is_text(open_page):
    nasty = (
        "<script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'></script>"
        "<!-- \" ' &amp; \u2028 <a href='http://localhost/'>link</a> \u202eturned"
    )
    facts = {"messages": [{"role": "user", "content": nasty}], "checks": {nasty: BRIEF}}
    facts |= {"reference": nasty, "kind": nasty, "where": f"{nasty}\ud800"}
    replies = {"base": said(nasty, {nasty: True}), "adapter": said(f"{nasty}!", {nasty: False})}
    sides = [Side(nasty, nasty, "base"), Side(f"{nasty}!", nasty, "1")]
    shown = open_page([asked(1, **facts, **replies, rejected=nasty)], sides, nasty)
    texts = shown.all(".text", "one.textContent")
    assert texts.count(nasty) == 3 and texts.count(f"{nasty}!") == 1
    for view in ("#to-blind", "#numbers button", "#answers button", "#key summary"):
        shown.all(view)[0].click()
    assert shown.run("return window.harmed") is None
    assert not shown.run("return document.querySelectorAll('main :is(img, a, script)').length")
