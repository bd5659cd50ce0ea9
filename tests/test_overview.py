"""The wide picture of held-out lines, other tasks, and some prompts."""

import math

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from inspect_lora.overview import PALE, draw_overview

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
            "lost": [], "is_clear": True, "p": 0.0005, "source": "held_out",
        },
        "calm": {
            "name": "calm", "lines": 50, "before": 50, "after": 41, "won": [],
            "lost": ["a"] * 9, "is_clear": True, "p": 0.004, "source": "held_out",
        },
        "in doubt": {
            "name": "in doubt", "lines": 50, "before": 9, "after": 8, "won": [],
            "lost": ["a"], "is_clear": False, "p": 1.0, "source": "held_out",
        },
        "tasks right": {
            "name": "tasks right", "lines": 40, "before": 3, "after": 4, "won": ["a", "b"],
            "lost": ["c"], "is_clear": False, "p": 1.0, "source": "tasks",
        },
        "polite": {
            "name": "polite", "lines": 40, "before": 30, "after": 18, "won": [],
            "lost": ["a"] * 12, "is_clear": True, "p": 0.0005, "source": "tasks",
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


def test_held_out_lines_other_tasks_and_a_prompt_stand_side_by_side(drawn):
    """By whose lines they are, whether they were won or lost; first what is clear."""
    own, tasks, prompt = drawn(RECORD)
    assert own == [
        "loss on unseen replies (lower is better)", "3.8000", "3.1000",
        "replies that pass “rings”", "0 of 40", "12 of 40",
        "replies that pass “calm”", "50 of 50", "41 of 50",
        "pass “in doubt”: change not shown", "9 of 50", "8 of 50",
    ]  # fmt: skip
    assert tasks == [
        "top-1 token differs from the base's", "41 %",
        "replies that pass “polite”", "30 of 40", "18 of 40",
        "pass “right”: change not shown", "3 of 40", "4 of 40",
    ]  # fmt: skip
    assert prompt[:2] == ["user", "my $5 roses <b>won</b>"]
    assert prompt[-3].endswith(" ...") and prompt[-2:] == ["adapter", "(nothing)"]


def test_what_is_not_clear_is_pale(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, _: figures.append(figure))
    assert draw_overview(RECORD, tmp_path / "overview.png")
    left, middle, _ = figures[0].axes
    assert [bar.get_alpha() for bar in left.patches] == [1.0] * 6 + [PALE] * 2
    assert [bar.get_alpha() for bar in middle.patches] == [1.0] * 3 + [PALE] * 2


@pytest.mark.parametrize(("rows", "said"), [(3, []), (4, ["and 1 more: report.md"]),
                                            (6, ["and 3 more: report.md"])])  # fmt: skip
def test_what_has_no_room_is_told_and_a_clear_loss_comes_before_a_loss_in_doubt(drawn, rows, said):
    doubt = RECORD["checks"]["in doubt"]
    checks = {str(n): doubt | {"name": str(n)} for n in range(rows - 1)}
    gain = {"gain": {"value": 0.1, "error": 0.2}}
    own, *_ = drawn(RECORD | gain | {"checks": checks | {"calm": RECORD["checks"]["calm"]}})
    assert own[:4] == ["replies that pass “calm”", "50 of 50", "41 of 50",
                       "loss on unseen replies: change not shown"]  # fmt: skip
    assert own[12:] == said
    _, tasks, _ = drawn(RECORD | {
        "checks": {f"t{n}": doubt | {"name": f"t{n}", "source": "tasks"} for n in range(rows)},
    })  # fmt: skip
    assert tasks[11:] == said


def test_lines_that_pass_as_before_are_shown_last(drawn):
    same = RECORD["checks"]["in doubt"] | {"name": "same", "after": 9, "lost": []}
    doubt = RECORD["checks"]["in doubt"] | {"p": 0.2}
    own, *_ = drawn(RECORD | {"checks": {"same": same, "in doubt": doubt}})
    assert own[3::3] == ["pass “in doubt”: change not shown", "pass “same”: the same lines"]


def test_a_loss_that_clearly_rose_stands_among_the_held_out_lines(drawn):
    worse = RECORD | {"loss": {"base": 3.0, "adapter": 3.1}, "checks": {}}
    own, tasks, _ = drawn(worse | {"gain": {"value": -0.1, "error": 0.01}})
    assert own == ["loss on unseen replies (lower is better)", "3.0000", "3.1000"]
    assert tasks == ["top-1 token differs from the base's", "41 %"]


@pytest.mark.parametrize("value", [0.1, -0.1])
@pytest.mark.parametrize(
    ("error", "lines"), [(0.09, 20), (math.inf, 20), (None, 20), (0.01, 19)], ids=str
)
def test_a_loss_in_doubt_says_so(drawn, value, error, lines):
    """By the rule of report.md: it wants twenty lines, and Student's quantile of their number."""
    loss = {"base": 3.0, "adapter": 3.0 - value}
    doubt = {"gain": {"value": value, "error": error}, "losses": RECORD["losses"][:lines]}
    own, *_ = drawn(RECORD | {"loss": loss, "checks": {}} | doubt)
    assert own[0] == "loss on unseen replies: change not shown" and len(own) == 3


@pytest.mark.parametrize(
    ("errors", "lines", "is_clear"),
    # Of twelve effective lines it takes 2.20 errors, as everywhere.
    [(2.1, 20, False), (2.3, 20, True), (9.0, 19, False), (9.0, 20, True)],
)
def test_the_picture_calls_clear_what_the_report_calls_clear(drawn, errors, lines, is_clear):
    gain = {"value": 0.7, "error": 0.7 / errors, "effective_lines": 12.0}
    losses = [{"where": f"a:{number}"} for number in range(lines)] * 2
    own, *_ = drawn(RECORD | {"gain": gain, "losses": losses, "checks": {}})
    assert ("change not shown" in own[0]) is not is_clear


def test_losses_that_are_written_alike_are_called_so(drawn):
    """However clear the difference is: its first digit is not seen."""
    alike = {"loss": {"base": 3.0, "adapter": 2.99999}, "gain": {"value": 1e-5, "error": 1e-6}}
    own, *_ = drawn(RECORD | alike | {"checks": {}})
    assert own == ["loss on unseen replies: no difference", "3.0000", "3.0000"]


def test_prompts_alone_show_the_replies_and_nothing_draws_nothing(drawn, tmp_path):
    alone = {"base": "b", "adapter_config": {}, "checks": {}, "replies": [ANSWERED]}
    own, tasks, prompt = drawn(alone)
    assert own == ["not measured: prompts have no loss,\nand these have no checks"]
    assert tasks == ["not measured"]
    assert prompt[0] == "user"
    assert not draw_overview(alone | {"replies": []}, tmp_path / "none.png")


def test_checks_of_other_tasks_are_not_shown_as_the_prompts_own(drawn):
    """The package's own tasks bring checks to every report, also to one on prompts alone."""
    rows = RECORD["checks"]
    own = {"rings": rows["rings"] | {"source": "prompts"}}
    right = {"tasks right": rows["tasks right"]}
    alone = RECORD | {"loss": None, "losses": []}
    gained, tasks, _ = drawn(alone | {"checks": right})
    assert gained[0].startswith("not measured") and len(gained) == 1
    assert "pass “right”: change not shown" in tasks
    gained, tasks, _ = drawn(alone | {"checks": right | own})
    assert gained == ["replies that pass “rings”", "0 of 40", "12 of 40"] and len(tasks) == 5


def test_what_was_not_measured_on_other_tasks_is_told(drawn):
    rows = RECORD["checks"]
    alone = RECORD | {"elsewhere": None}
    _, tasks, _ = drawn(alone | {"checks": {"rings": rows["rings"]}})
    assert tasks == ["not measured"]
    _, tasks, _ = drawn(alone | {"checks": {"tasks right": rows["tasks right"]}})
    assert tasks[0] == "pass “right”: change not shown"
    assert tasks[3:] == ["top-1 token: not measured"]


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
    ("source", "own", "title"),
    [("held_out", "On held-out lines", "Unseen prompts"),
     ("prompts", "On the prompts", "Prompts")],
)  # fmt: skip
def test_only_held_out_prompts_are_called_unseen(drawn, monkeypatch, source, own, title):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: titles.append(text))
    loss = RECORD["loss"] if source == "held_out" else None
    drawn(RECORD | {"loss": loss, "replies": [ANSWERED | {"source": source}]})
    assert titles == [own, "On other tasks", title]


def test_what_the_adapter_may_have_learned_is_not_called_unseen(drawn, monkeypatch):
    titles = []
    monkeypatch.setattr(Axes, "set_title", lambda _, text, **__: titles.append(text))
    for learned, name, heads in (
        ("none", "unseen", ("On held-out lines", "Unseen prompts")),
        ("not compared", "unseen", ("On held-out lines", "Unseen prompts")),
        ("not known", "given", ("On the given lines", "Given prompts")),
    ):
        gained, *_ = drawn(RECORD | {"held_out": {"learned": learned}})
        assert gained[0] == f"loss on {name} replies (lower is better)"
        assert (titles[-3], titles[-1]) == heads
    gained, *_ = drawn(RECORD | {"held_out": {}})  # of an older version
    assert gained[0].startswith("loss on given replies")


def test_copies_are_one_line_in_the_picture(drawn):
    for lines, is_clear in ((19, False), (20, True)):
        losses = [{"where": f"a:{n}", "line": f"a:{n % lines}"} for n in range(40)]
        gained, *_ = drawn(RECORD | {"losses": losses, "checks": {}})
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
    checks = {str(number): row | {"is_clear": number < 2} for number in range(5)}
    lost = {"x" + key: row | {"source": "tasks"} for key, row in checks.items()}
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
        assert len(boxes) >= 10
        assert max(box.x1 for box in boxes) < end
        assert min(box.y0 for box in boxes) > axes.bbox.y0
        for one in boxes:
            assert sum(one.overlaps(other) for other in boxes) == 1  # with itself


def test_a_real_file_is_wide_enough_for_a_page(tmp_path):
    assert draw_overview(RECORD, tmp_path / "overview.png")
    png = (tmp_path / "overview.png").read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1320, 440)
