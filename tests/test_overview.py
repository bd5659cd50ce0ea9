"""The wide picture of what was gained and what it cost."""

import pytest
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
    "loss": {"base": 3.8, "adapter": 3.1},
    "gain": {"value": 0.7, "error": 0.1},
    "losses": [{"where": f"a:{number}"} for number in range(20)],
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
        "may be chance": {
            "name": "may be chance", "lines": 50, "before": 9, "after": 8, "won": [],
            "lost": ["a"], "is_clear": False,
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


def test_gains_costs_and_a_prompt_stand_side_by_side(drawn):
    gained, lost, prompt = drawn(RECORD)
    assert gained == [
        "loss on unseen replies", "3.800", "3.100",
        "replies that pass “rings”", "0 of 40", "12 of 40",
    ]  # fmt: skip
    assert lost == [
        "replies that pass “calm”", "50 of 50", "41 of 50",
        "other tasks: first choice is another token", "0 %", "41 %",
    ]  # fmt: skip
    assert prompt[:2] == ["user", "my $5 roses <b>won</b>"]
    assert prompt[3].endswith("...") and prompt[-1] == "(nothing)"


def test_a_loss_that_rose_is_a_cost_and_one_in_doubt_says_so(drawn):
    worse = RECORD | {"loss": {"base": 3.0, "adapter": 3.1}, "checks": {}}
    gained, lost, _ = drawn(worse | {"gain": {"value": -0.1, "error": 0.01}})
    assert gained == ["nothing that is clear"] and lost[0] == "loss on unseen replies"
    _, lost, _ = drawn(worse | {"gain": {"value": -0.1, "error": 0.09}})
    assert lost[0] == "loss on unseen replies, no clear difference"


@pytest.mark.parametrize(
    ("errors", "lines", "is_clear"),
    # Of twelve effective lines it takes 2.20 errors, as everywhere.
    [(2.1, 20, False), (2.3, 20, True), (9.0, 9, False), (9.0, 10, True)],
)
def test_the_picture_calls_clear_what_the_report_calls_clear(drawn, errors, lines, is_clear):
    gain = {"value": 0.7, "error": 0.7 / errors, "effective_lines": 12.0}
    losses = [{"where": f"a:{number}"} for number in range(lines)] * 2
    gained, *_ = drawn(RECORD | {"gain": gain, "losses": losses})
    assert (gained[0] == "loss on unseen replies") is is_clear


def test_prompts_alone_show_the_replies_and_nothing_draws_nothing(drawn, tmp_path):
    alone = {"base": "b", "adapter_config": {}, "checks": {}, "replies": [ANSWERED]}
    gained, lost, prompt = drawn(alone)
    assert gained == lost == ["nothing that is clear"] and prompt[0] == "user"
    assert not draw_overview(alone | {"replies": []}, tmp_path / "none.png")


def test_a_real_file_is_wide_enough_for_a_page(tmp_path):
    assert draw_overview(RECORD, tmp_path / "overview.png")
    png = (tmp_path / "overview.png").read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (1320, 440)
