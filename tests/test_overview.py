"""The wide picture of what was gained, what else changed, and some prompts."""

import math

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspect_lora.overview import draw_overview

ANSWERED = {
    "source": "held_out",
    "messages": [{"role": "user", "content": "my $5 roses <b>won</b>"}],
    "base": {"text": "I am a model. " * 40},
    "adapter": {"text": ""},
}
RECORD = {
    "base": "somebody/Model-1B",
    "adapter_config": {"r": 8, "lora_alpha": 16},
    "held_out": {"file": "eval.jsonl", "learned": "none"},
    "loss": {"base": 3.8, "adapter": 3.1},
    "gain": {"value": 0.7, "error": 0.1},
    "losses": [{"where": f"eval.jsonl:{number}"} for number in range(20)],
    "lower_on": 19,
    "checks": {
        "rings": {
            "name": "rings", "lines": 40, "before": 0, "after": 12, "won": ["a"] * 12,
            "lost": [], "is_clear": True,
        },
        "calm": {
            "name": "calm", "lines": 50, "before": 50, "after": 41, "won": [],
            "lost": ["a"] * 9, "is_clear": True,
        },
        "in doubt": {
            "name": "in doubt", "lines": 50, "before": 9, "after": 8, "won": [],
            "lost": ["a"], "is_clear": False,
        },
        "others": {
            "name": "others", "lines": 40, "before": 3, "after": 3, "won": ["a"],
            "lost": ["b"], "is_clear": False,
        },
        "the same": {
            "name": "the same", "lines": 40, "before": 3, "after": 3, "won": [],
            "lost": [], "is_clear": False,
        },
    },
    "elsewhere": {"no system message": {"x 1": {"other_tokens": {"value": 0.41, "error": 0.01}}}},
    "replies": [ANSWERED],
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Return a function that draws a record, and gives the texts of each panel."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))

    def draw(record):
        assert draw_overview(record, tmp_path / "overview.png")
        return [[text.get_text() for text in axes.texts] for axes in figures[-1].axes]

    return draw


def test_gains_changes_and_a_prompt_stand_side_by_side(drawn):
    """What is not shown says so, after what is clear."""
    gained, lost, prompt = drawn(RECORD)
    assert gained == [
        "loss on unseen replies (lower is better)", "3.8000", "3.1000",
        "replies that pass “rings”", "0 of 40", "12 of 40",
        "pass “others”: not shown", "3 of 40", "3 of 40",
    ]  # fmt: skip
    assert lost == [
        "other tasks: top-1 token differs", "41 %",
        "replies that pass “calm”", "50 of 50", "41 of 50",
        "pass “in doubt”: not shown", "9 of 50", "8 of 50",
    ]  # fmt: skip
    assert prompt[:2] == ["user", "my $5 roses <b>won</b>"]
    assert prompt[-3].endswith(" ...") and prompt[-2:] == ["adapter", "(nothing)"]


def test_a_loss_that_clearly_rose_is_no_gain(drawn):
    worse = RECORD | {"loss": {"base": 3.0, "adapter": 3.1}, "checks": {}}
    gained, lost, _ = drawn(worse | {"gain": {"value": -0.1, "error": 0.01}})
    assert gained == ["nothing"]
    assert lost[:3] == ["loss on unseen replies (lower is better)", "3.0000", "3.1000"]


@pytest.mark.parametrize("value", [0.1, -0.1])
@pytest.mark.parametrize(
    ("error", "lines"), [(0.09, 20), (math.inf, 20), (None, 20), (0.01, 9)], ids=str
)
def test_a_loss_in_doubt_stays_on_the_left_and_says_so(drawn, value, error, lines):
    """By the rule of report.md, which wants ten lines, and Student's quantile of their number."""
    loss = {"base": 3.0, "adapter": 3.0 - value}
    doubt = {"gain": {"value": value, "error": error}, "losses": RECORD["losses"][:lines]}
    gained, lost, _ = drawn(RECORD | {"loss": loss, "checks": {}} | doubt)
    assert gained[0] == "loss on unseen replies: not shown" and len(gained) == 3
    assert lost == ["other tasks: top-1 token differs", "41 %"]


@pytest.mark.parametrize(
    ("errors", "lines", "is_clear"),
    # Of twelve effective lines it takes 2.20 errors, as everywhere.
    [(2.1, 20, False), (2.3, 20, True), (9.0, 9, False), (9.0, 10, True)],
)
def test_the_picture_calls_clear_what_the_report_calls_clear(drawn, errors, lines, is_clear):
    gain = {"value": 0.7, "error": 0.7 / errors, "effective_lines": 12.0}
    losses = [{"where": f"a:{number}"} for number in range(lines)] * 2
    gained, *_ = drawn(RECORD | {"gain": gain, "losses": losses})
    assert ("not shown" in gained[0]) is not is_clear


def test_losses_that_are_written_alike_are_called_so(drawn):
    """However clear the difference is: its first digit is not seen."""
    alike = {"loss": {"base": 3.0, "adapter": 2.99999}, "gain": {"value": 1e-5, "error": 1e-6}}
    gained, *_ = drawn(RECORD | alike | {"checks": {}})
    assert gained == ["loss on unseen replies: no difference", "3.0000", "3.0000"]


def test_prompts_alone_show_the_replies_and_nothing_draws_nothing(drawn, tmp_path):
    alone = {"base": "b", "adapter_config": {}, "checks": {}, "replies": [ANSWERED]}
    gained, lost, prompt = drawn(alone)
    assert gained == ["not measured: prompts have no loss"]
    assert lost == ["other tasks and checks: not measured"]
    assert prompt[0] == "user"
    assert not draw_overview(alone | {"replies": []}, tmp_path / "none.png")


def test_without_a_loss_only_a_check_of_the_users_own_is_a_gain(drawn):
    """The package's own tasks bring checks to every report, also to one on prompts alone."""
    rows = RECORD["checks"]
    own = {"rings": rows["rings"] | {"source": "prompts"}}
    right = rows["others"] | {"name": "tasks right", "source": "tasks", "lost": []}
    alone = RECORD | {"loss": None, "losses": []}
    none, tasks = "not measured: prompts have no loss", "pass “tasks: right”: not shown"
    gained, *_ = drawn(alone | {"checks": {"the same": rows["the same"]}})
    assert gained == [none]
    gained, *_ = drawn(alone | {"checks": {"tasks right": right}})
    assert sorted(gained) == sorted([tasks, "3 of 40", "3 of 40", none])
    gained, *_ = drawn(alone | {"checks": {"tasks right": right, **own}})
    assert gained[0] == "replies that pass “rings”" and tasks in gained and none not in gained


def test_what_was_not_measured_elsewhere_is_not_called_nothing(drawn):
    rows = RECORD["checks"]
    with_checks = lambda *names: RECORD | {  # noqa: E731
        "elsewhere": None, "checks": {name: rows[name] for name in names},
    }  # fmt: skip
    _, lost, _ = drawn(with_checks("rings", "others"))  # one that as many lost as won
    assert lost == ["other tasks: not measured\nno check is passed less often"]
    _, lost, _ = drawn(with_checks("rings", "calm"))
    assert lost[0] == "other tasks: not measured" and "replies that pass “calm”" in lost
    _, lost, _ = drawn(with_checks())
    assert lost == ["other tasks and checks: not measured"]


def test_as_many_prompts_are_shown_as_there_is_room_for(drawn):
    def prompt(number, **changes):
        asked = [{"role": "user", "content": f"number {number}"}]
        short = {"messages": asked, "base": {"text": "No."}, "adapter": {"text": "Yes."}}
        return ANSWERED | short | changes

    long = prompt("to be long " * 12, base=ANSWERED["base"])
    replies = [prompt(0), prompt(1), long, prompt(2), prompt(3)]
    *_, shown = drawn(RECORD | {"replies": replies})
    asked = [text for text in shown if text.startswith("number")]
    assert asked == ["number 0", "number 1", "number 2"]  # the others have no room
    *_, shown = drawn(RECORD | {"replies": [prompt(0, source="tasks"), *replies]})
    assert shown.count("number 0") == 1


@pytest.mark.parametrize(
    ("source", "title"), [("held_out", "Unseen prompts"), ("prompts", "Prompts")]
)
def test_only_held_out_prompts_are_called_unseen(drawn, monkeypatch, source, title):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: titles.append(text))
    drawn(RECORD | {"replies": [ANSWERED | {"source": source}]})
    assert titles == ["What was gained", "What else changed", title]


def test_what_the_adapter_may_have_learned_is_not_called_unseen(drawn, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: titles.append(text))
    for learned, name, title in (
        ("none", "unseen", "Unseen prompts"),
        ("not compared", "unseen", "Unseen prompts"),
        ("not known", "the given", "Given prompts"),
    ):
        gained, *_ = drawn(RECORD | {"held_out": {"learned": learned}})
        assert gained[0] == f"loss on {name} replies (lower is better)" and titles[-1] == title
    gained, *_ = drawn(RECORD | {"held_out": {}})  # of an older version
    assert gained[0].startswith("loss on the given replies")


def test_copies_are_one_line_in_the_picture(drawn):
    for lines, is_clear in ((9, False), (10, True)):
        losses = [{"where": f"a:{n}", "line": f"a:{n % lines}"} for n in range(20)]
        gained, *_ = drawn(RECORD | {"losses": losses})
        assert ("not shown" not in gained[0]) is is_clear


def test_a_prompt_in_letters_that_the_font_lacks_is_passed_over(drawn):
    chinese = ANSWERED | {"adapter": {"text": "你好"}}
    *_, prompt = drawn(RECORD | {"replies": [chinese, ANSWERED]})
    assert prompt[:2] == ["user", "my $5 roses <b>won</b>"]
    *_, prompt = drawn(RECORD | {"replies": [chinese]})
    assert prompt == ["no short one to show: see replies.html"]


def test_the_longest_texts_stay_within_their_panels(monkeypatch, tmp_path):
    """Nothing is cut off, or lies above what stands beside it."""
    figures = []
    real = Figure.savefig
    save = lambda figure, path: (figures.append(figure), real(figure, path))  # noqa: E731
    monkeypatch.setattr(Figure, "savefig", save)
    words = "How many mornings would somebody want "
    row = RECORD["checks"]["rings"] | {"name": "names somebody to ring at night", "before": 40}
    checks = {str(number): row | {"is_clear": number < 2} for number in range(4)}
    lost = {"x" + key: row | {"won": [], "lost": ["a"] * 9} for key, row in checks.items()}
    replies = [{
        "source": "prompts", "messages": [{"role": "user", "content": (words * 9)[:150]}],
        "base": {"text": words * 9}, "adapter": {"text": words * 9},
    }, ANSWERED | {"base": {"text": "No."}}]  # fmt: skip
    assert draw_overview(
        RECORD | {"checks": checks | lost, "replies": replies}, tmp_path / "overview.png"
    )
    (figure,) = figures
    ends = [axes.bbox.x0 for axes in figure.axes[1:]] + [figure.bbox.x1]
    for axes, end in zip(figure.axes, ends, strict=True):
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) >= 10 and max(box.x1 for box in boxes) < end
        assert min(box.y0 for box in boxes) > axes.bbox.y0
        for one in boxes:
            assert sum(one.overlaps(other) for other in boxes) == 1  # with itself


def test_a_real_file_is_wide_enough_for_a_page(tmp_path):
    assert draw_overview(RECORD, tmp_path / "overview.png")
    png = (tmp_path / "overview.png").read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1320, 440)
