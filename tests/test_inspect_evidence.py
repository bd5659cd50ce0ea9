"""What a run measures after training: parts of the adapter, kinds, updates, samples, picture."""

import contextlib
import functools
import itertools
import json
import math
import re
import shutil
import types
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from by_hand import MergedByHand, in_layers, read_conversations, render, reply_loss
from conftest import TINY, handlers_restored, write_short_data
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationMixin

import train_lora_single as t

inspect_lora = pytest.importorskip("inspect_lora")

TENSORS = "adapter_model.safetensors"


def record_of(output):
    return json.loads((output / "run.json").read_text(encoding="utf-8"))


def section(text, name):
    """Return the lines of the sections of this name, each without its first ten columns."""
    found = re.findall(rf"^{name:<10}.*\n(?: {{10}}.*\n)*", text, re.MULTILINE)
    return [line[10:] for one in found for line in one.splitlines()]


def log_of(output):
    return (output / "all_logs.log").read_text(encoding="utf-8")


def unwrapped(text):
    return " ".join(text.split())


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and path.stat().st_size > 10_000


@pytest.fixture
def edit_lora_config(monkeypatch):
    """Return a function that changes LoraConfig as an edit in the file would."""
    plain = t.lora_config

    def edit(**changes):
        def edited(settings):
            config = plain(settings).to_dict()
            known = set(peft.LoraConfig.__dataclass_fields__)
            return peft.LoraConfig(**{k: v for k, v in (config | changes).items() if k in known})

        monkeypatch.setattr(t, "lora_config", edited)

    return edit


# ==== Two runs, measured by other means

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj", "in_proj_qkv", "out_proj"]


def deep_config(settings):
    """A LoraConfig in which nearly every module has a scale or rank of its own."""
    return peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", use_rslora=True,
        rank_pattern={"up_proj": 6}, alpha_pattern={"q_proj": 12},
        lora_dropout=settings.LORA_DROPOUT,
    )  # fmt: skip


def deep_scale(target):
    """Return alpha / sqrt(r), as use_rslora and the two patterns above ask for."""
    alpha, r = {"up_proj": (6, 6), "q_proj": (12, 4)}.get(target, (6, 4))
    return alpha / math.sqrt(r)


def make_deep_model(folder):
    """Write a model of four layers whose replies differ with the prompt, and which samples."""
    config = AutoConfig.from_pretrained(TINY).get_text_config()
    config.num_hidden_layers, config.layer_types = 4, config.layer_types * 2
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if "proj" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(TINY) / name, folder)
    by_chance = {"do_sample": True, "temperature": 5.0, "top_p": 0.99, "top_k": 50}
    (folder / "generation_config.json").write_text(json.dumps(by_chance), encoding="utf-8")
    return str(folder)


TALKS = [  # kind, what is said in turn
    ("loss", "I still lay two places", "Habit, or company?"),
    ("loss", "it is a year on Sunday", "Will you be on your own, or is somebody coming?"),
    ("loss", "his coat is still on the hook, I can't", "Leave it there. It is a good hook."),
    ("plain", "table for one again", "What's on the menu?"),
    (None, "still raining", "The ducks are pleased.", "well I am not", "Tea, then?"),
    ("plain", "I can't find my glasses anywhere in this house", "Have you felt on your head?"),
    ("plain", "they moved the bus stop", "Far?"),
    ("chat", "who was that on the phone last night?", "I can't hear your phone. Shall we guess?"),
    ("chat", "beans are up", "Already!"),
    ("worry", "I saw a man by the gate, and then he was gone", "That is a fright. Was it locked?"),
]


def write_held_out(path):
    """Write eleven held-out examples of four kinds, and two of none, in both forms of a line."""
    lines = []
    for kind, *said in TALKS:
        roles = ("user", "assistant") * len(said)
        turns = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
        turns.insert(0, {"role": "system", "content": "You are Nell."})
        row = {"kind": kind, "prompt": turns[:-1], "completion": turns[-1:]}
        lines.append(json.dumps(row if kind else {"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """Run on a deeper model, with DeltaNet targets, many kinds, and seven examples measured.

    Return its output, what was in memory and on disk before the evidence, and the model after it.
    """
    folder = tmp_path_factory.mktemp("deep")
    model = make_deep_model(folder / "model")
    flags = [*write_short_data(folder, train=12), "--output_dir", str(folder / "output")]
    write_held_out(folder / "eval.jsonl")
    flags += ["--model_name", model, "--lora_target_modules", *TARGETS, "--eval_group", "kind"]
    flags += ["--evidence_examples", "7", "--num_samples", "2", "--max_new_tokens", "12"]
    flags += ["--learning_rate", "1e-2", "--num_epochs", "4"]
    seen = types.SimpleNamespace(output=folder / "output", base=model)
    with pytest.MonkeyPatch.context() as patch, handlers_restored():
        patch.chdir(t.HERE)
        patch.setattr(t, "lora_config", deep_config)
        watch_adapter(patch, seen)
        watch_svd(patch, seen)
        t.main(flags)
    return seen


def watch_svd(monkeypatch, seen):
    """Remember how much larger than its argument a result of torch.linalg.svd is at the most."""
    svd, seen.growth = torch.linalg.svd, 0

    def watched(matrix, *args, **more):
        results = svd(matrix, *args, **more)
        seen.growth = max(seen.growth, *(one.numel() / matrix.numel() for one in results))
        return results

    monkeypatch.setattr(torch.linalg, "svd", watched)


def watch_adapter(monkeypatch, seen):
    """Remember the adapter that is loaded for the proof, in memory and on disk, in seen."""
    load = peft.PeftModel.from_pretrained

    def from_pretrained(base, path, **more):
        seen.model = load(base, path, **more)
        seen.memory = memory_of(seen.model)
        seen.files = {file.name: file.read_bytes() for file in Path(path).iterdir()}
        return seen.model

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", from_pretrained)


def memory_of(model):
    """Return all that decides what a model computes: its tensors, and each LoRA's state."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = {
        name: (dict(module.scaling), module.disable_adapters, module.merged_adapters)
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return tensors, states


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (2, []),
        (3, ["layer 0", "layer 1", "layer 2"]),
        (4, ["layer 0", "layer 1", "layers 2 to 3"]),
        (10, ["layers 0 to 2", "layers 3 to 5", "layers 6 to 9"]),
    ],
)
def test_each_layer_with_lora_is_in_one_of_the_thirds(count, names):
    paths = {f"model.layers.{n}.mlp.up_proj" for n in range(count)}
    thirds = inspect_lora.thirds_of_layers(dict.fromkeys(paths))
    assert [*thirds] == names
    assert sorted(path for part in thirds.values() for path in part) == sorted(paths) * bool(names)


def test_experts_are_of_the_module_that_holds_them_all():
    paths = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in range(3)]
    paths += ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj"]
    paths += ["base_model.model.lm_head"]
    groups = inspect_lora.paths_by_sublayer(dict.fromkeys(paths))
    assert groups == {
        "attention": {paths[3]}, "feed-forward": {paths[4]}, "experts": {*paths[:3]},
        "lm_head": {paths[5]},
    }  # fmt: skip


@pytest.fixture(scope="session", params=["finished", "deep"])
def by_hand(request):
    """Return a run's record, and how to compute its losses without the script and without PEFT."""
    if request.param == "finished":
        output, name, scale_of = request.getfixturevalue("finished"), TINY, lambda _: 16 / 8
    else:
        run = request.getfixturevalue("deep")
        output, name, scale_of = run.output, run.base, deep_scale
    record = record_of(output)
    merged = MergedByHand(name, output / "final_lora" / TENSORS, scale_of)
    conversations = read_conversations(record["settings"]["EVAL_FILE"])
    return types.SimpleNamespace(
        record=record, output=output, losses=functools.partial(merged.losses, conversations),
        factors=merged.factors, weights=merged.weights, targets=merged.targets(),
    )  # fmt: skip


def test_each_held_out_example_has_its_loss_in_nats_per_learned_token(by_hand):
    rows = by_hand.record["evidence"]["losses"]
    assert [row["adapter"] for row in rows] == pytest.approx(by_hand.losses(), abs=1e-4)
    base = by_hand.losses(lambda path: False)
    assert [row["base"] for row in rows] == pytest.approx(base, abs=1e-4)
    assert abs(np.mean(base) - np.mean(by_hand.losses())) > 0.02


DEEP_PARTS = {
    "attention alone": lambda path: "self_attn" in path,
    "feed-forward alone": lambda path: "mlp" in path,
    "DeltaNet alone": lambda path: "linear_attn" in path,
    "layer 0 alone": in_layers(0, 0),
    "layer 1 alone": in_layers(1, 1),
    "layers 2 to 3 alone": in_layers(2, 3),
}


def expected_parts(by_hand):
    """Return {label: arguments of losses()}, in the order of the table."""
    is_deep = by_hand.record["settings"]["LORA_TARGET_MODULES"] == TARGETS
    table = {"as trained": {}, "base model": {"wanted": lambda path: False}}
    for strength in (0.25, 0.5, 0.75, 1.25, 1.5, 2):
        table[f"update x {strength}"] = {"strength": strength}
    names = [*DEEP_PARTS] if is_deep else [*DEEP_PARTS][:2]  # too few layers for thirds
    groups = [name for name in names if "layer" not in name]
    table |= {name: {"wanted": DEEP_PARTS[name]} for name in groups}
    for target in by_hand.targets:
        table[f"{target} alone"] = {"wanted": lambda path, end=f".{target}": path.endswith(end)}
    table |= {name: {"wanted": DEEP_PARTS[name]} for name in names if name not in groups}
    cuts = ["cut to 4 directions", "cut to 2 directions", "cut to 1 direction"]
    if is_deep:  # ranks of 4 and of 6
        cuts = ["cut to 1/2 of the directions", "cut to 1/4 of the directions"]
    table |= {title: {"divisor": 2 ** (n + 1)} for n, title in enumerate(cuts)}
    return table


def measured_examples(evidence):
    """Return the numbers of the held-out examples on which the parts were measured."""
    all_losses = [row["base"] for row in evidence["losses"]]  # no two are alike
    numbers = [all_losses.index(loss) for loss in evidence["parts"]["base model"]["losses"]]
    assert [evidence["losses"][number]["where"] for number in numbers] == evidence["where"]
    return numbers


def test_each_part_has_the_loss_of_weights_merged_by_hand(by_hand):
    evidence = by_hand.record["evidence"]
    chosen = measured_examples(evidence)
    tokens = np.array([evidence["losses"][number]["tokens"] for number in chosen])
    expected = expected_parts(by_hand)
    assert [*evidence["parts"]] == [*expected]
    for label, how in expected.items():
        losses = np.array(by_hand.losses(**how))[chosen]
        part = evidence["parts"][label]
        assert part["losses"] == pytest.approx(losses, abs=1e-4), label
        assert part["loss"] == pytest.approx((losses * tokens).sum() / tokens.sum(), abs=1e-4)


def standard_error(numerators, denominators):
    """Return the error of a ratio of sums, as Cochran writes it (Sampling Techniques, 6.4)."""
    y, x = np.array(numerators), np.array(denominators)
    n, value = len(y), y.sum() / x.sum()
    return math.sqrt(((y - value * x) ** 2).sum() / (n - 1) / n) / abs(x.mean())


def test_shares_differences_and_errors_follow_from_the_examples_losses(by_hand):
    evidence = by_hand.record["evidence"]
    parts = evidence["parts"]
    n = np.array([evidence["losses"][number]["tokens"] for number in measured_examples(evidence)])
    base, trained = (np.array(parts[name]["losses"]) * n for name in ("base model", "as trained"))
    for label, part in parts.items():
        losses = np.array(part["losses"]) * n
        change, gained = losses - trained, base - losses
        assert part["against_trained"]["value"] == pytest.approx(change.sum() / n.sum())
        assert part["against_trained"]["error"] == pytest.approx(standard_error(change, n))
        share = gained.sum() / (base - trained).sum()
        assert part["of_gain"]["value"] == pytest.approx(share)
        error = standard_error(gained, base - trained)
        assert part["of_gain"]["error"] == pytest.approx(error, abs=1e-12)
        assert part["better_on"] == (losses < trained).sum(), label


def test_the_printed_table_holds_these_numbers(by_hand):
    lines = section(log_of(by_hand.output), "evidence")
    assert max(map(len, lines)) <= 90
    parts = by_hand.record["evidence"]["parts"]
    for name, part in parts.items():
        if part["kind"] == "target":
            assert not [line for line in lines if line.startswith(name)]
            continue
        (line,) = [line for line in lines if line.startswith(f"{name}  ")]
        wanted = [f"{part['loss']:.4f}"]
        if name != "as trained":
            change = part["against_trained"]
            wanted += [f"{change['value']:+.4f} ± {change['error']:.4f}"]
            wanted += [f"{part['better_on']}/{len(part['losses'])}"]
        if name not in ("as trained", "base model"):
            share = part["of_gain"]
            wanted += [f"{100 * share['value']:.1f} ± {100 * share['error']:.1f} %"]
        rest = f"{line[len(name) :]} "
        assert all(f" {number} " in rest for number in wanted), (line, wanted)
    shares = {name: parts[f"{name} alone"]["of_gain"]["value"] for name in by_hand.targets}
    best_first = sorted(shares, key=shares.get, reverse=True)
    said = "each target alone, of the gain (they need not add up to 100%): " + ", ".join(
        f"{name} {shares[name]:.0%}" for name in best_first
    )
    assert said in unwrapped("\n".join(lines))


def test_at_most_evidence_examples_are_measured_and_it_is_said(deep):
    evidence = record_of(deep.output)["evidence"]
    assert len(evidence["losses"]) == evidence["examples"] == 11
    numbers = measured_examples(evidence)
    gaps = {later - former for former, later in itertools.pairwise(numbers)}
    assert len(numbers) == 7 and gaps == {1, 2}  # evenly over the file
    assert {len(part["losses"]) for part in evidence["parts"].values()} == {7}
    said = r"^ {10}of 7 held-out examples, evenly spread, in \d+ s; ± is one standard error$"
    assert re.search(said, log_of(deep.output), re.M)


def test_disabling_the_adapter_gives_the_base_models_losses(deep):
    tokenizer = AutoTokenizer.from_pretrained(deep.base)
    record = record_of(deep.output)
    conversations = read_conversations(record["settings"]["EVAL_FILE"])
    with deep.model.disable_adapter():
        losses = [reply_loss(deep.model, tokenizer, one) for one in conversations]
    assert [row["base"] for row in record["evidence"]["losses"]] == pytest.approx(losses, abs=1e-4)


def is_as_before(run):
    """Return whether the adapter, in memory and on disk, is to the bit what it was."""
    (tensors, states), (before, states_before) = memory_of(run.model), run.memory
    assert tensors.keys() == before.keys()
    same = [tensors[name].equal(before[name]) for name in tensors]
    for name, content in run.files.items():
        if name != "README.md":  # the model card gets the losses
            same.append((run.output / "final_lora" / name).read_bytes() == content)
    return all(same) and states == states_before


def test_after_the_evidence_the_adapter_is_to_the_bit_what_it_was(deep):
    assert is_as_before(deep) and len(deep.files) > 4


def test_an_error_in_a_cut_leaves_the_adapter_as_it_was(tmp_path, monkeypatch, no_picture):
    """The samples after it are the adapter's, and not those of what was cut before the error."""
    seen = types.SimpleNamespace()
    watch_adapter(monkeypatch, seen)
    svd, calls = torch.linalg.svd, []

    def fail_in_the_third(*args, **more):
        calls.append(None)
        if len(calls) == 3:
            raise torch.linalg.LinAlgError("it did not converge")
        return svd(*args, **more)

    monkeypatch.setattr(torch.linalg, "svd", fail_in_the_third)
    output = tmp_path / "output"
    flags = [*write_short_data(tmp_path), "--output_dir", str(output), "--num_samples", "0"]
    t.main([*flags, "--max_steps", "2", "--evidence_examples", "2"])
    assert "evidence failed" in log_of(output)
    tensors = memory_of(seen.model)[0]
    assert [name for name, one in seen.memory[0].items() if not one.equal(tensors[name])] == []


def test_cutting_makes_no_matrix_larger_than_the_factors(deep):
    """All of V of one down_proj of Qwen3.5-4B would be 9216 x 9216, and take minutes."""
    assert deep.growth <= 1


# ==== The estimator


def test_ratio_is_cochrans_on_fixed_numbers():
    numerators, denominators = [1.0, -2.0, 4.5, 0.5], [3.0, 1.0, 8.0, 4.0]
    found = inspect_lora.ratio_with_error(numerators, denominators)
    assert found.value == 0.25
    # The residuals are 0.25, -2.25, 2.5 and -0.5, whose squares sum to 11.625.
    assert found.error == pytest.approx(math.sqrt(11.625 / 3 / 4) / 4, rel=1e-12)
    assert found.error == pytest.approx(standard_error(numerators, denominators), rel=1e-12)


def test_ratios_error_is_that_of_a_bootstrap_over_examples():
    random = np.random.default_rng(5)
    tokens = random.integers(10, 90, 150).astype(float)
    change = tokens * random.normal(-0.3, 0.4, 150)
    found = inspect_lora.ratio_with_error([*change], [*tokens])
    picks = random.integers(0, 150, (4000, 150))
    resampled = change[picks].sum(1) / tokens[picks].sum(1)
    assert found.error == pytest.approx(resampled.std(), rel=0.08)
    assert found.is_clear() and abs(found.value) > 2 * found.error


def test_replies_of_one_line_count_as_one_example():
    """They are alike: here each line's replies have the same difference, so two lines tell two."""
    changes, tokens = [1.0, 1.0, 1.0, 5.0, 5.0], [10.0, 10.0, 10.0, 20.0, 20.0]
    found = inspect_lora.ratio_with_error(changes, tokens, ["a:1", "a:1", "a:1", "a:2", "a:2"])
    assert found == inspect_lora.ratio_with_error([3.0, 10.0], [30.0, 40.0])
    assert found.error > 1.5 * inspect_lora.ratio_with_error(changes, tokens).error
    assert inspect_lora.ratio_with_error(changes, tokens, ["a:1"] * 5).error == math.inf


def test_one_example_bears_nothing():
    found = inspect_lora.ratio_with_error([-5.0], [10.0])
    assert found.value == -0.5 and found.error == math.inf and not found.is_clear()


@pytest.mark.parametrize(("value", "clear"), [(0.21, True), (-0.21, True), (0.19, False)])
def test_a_difference_is_clear_beyond_twice_its_error(value, clear):
    assert inspect_lora.Estimate(value, 0.1).is_clear() is clear


# ==== The sentences under the table


def made_up_part(title, share):
    """Return a part that keeps this share of a gain of 1 nat; share may be (share, its error)."""
    value, error = share if isinstance(share, tuple) else (share, 0.002)
    kind, what = "group", title.removesuffix(" alone")
    if title == "as trained":
        kind, what = "whole", 1.0
    elif title == "base model":
        kind, what = "base", 0.0
    elif title.startswith("update x "):
        kind, what = "strength", float(title.removeprefix("update x "))
    elif title.startswith("cut to "):
        kind, what = "cut", int(title.split()[2])
    elif title.startswith("layer"):
        kind = "layers"
    return inspect_lora.Part(
        kind, what, title, contextlib.nullcontext,
        loss=3 - value,
        of_gain=inspect_lora.Estimate(value, error),
        against_trained=inspect_lora.Estimate(1 - value, error),
    )  # fmt: skip


def conclusions(gain=(1.0, 0.01), lines=10, **shares):
    """Return the sentences on a made-up table, as one text.

    Each part is the share of the gain that it keeps, or (share, its error); a gain of 1 makes the
    difference to the trained adapter 1 - share.
    """
    shares = {"as trained": 1.0, "base model": 0.0} | shares
    parts = [made_up_part(title, share) for title, share in shares.items()]
    return "\n".join(inspect_lora.conclusions(parts, inspect_lora.Estimate(*gain), lines))


SCALES = {f"update x {scale}": 0.9 for scale in ("0.25", "0.5", "0.75", "1.25", "1.5", "2")}


def test_an_update_that_is_better_weaker_went_too_far():
    text = conclusions(**SCALES | {"update x 0.75": 1.06, "update x 0.5": 1.03})
    assert "alpha: at x 0.75 " in text and "6 % more of the gain" in text
    assert "Worth trying" in text  # what another run would reach was not measured
    assert "too far" in text and "lower LEARNING_RATE" in text and "smaller LORA_ALPHA" in text


def test_an_update_that_is_better_stronger_stopped_short():
    text = conclusions(**SCALES | {"update x 1.5": 1.2, "update x 2": 1.1})
    assert "alpha: at x 1.5 " in text and "20 % more of the gain" in text
    assert "stopped short" in text and "higher LEARNING_RATE" in text


def test_three_hundredths_of_the_gain_matter():
    assert "alpha: at x 1.25 " in conclusions(**SCALES | {"update x 1.25": 1.03})


@pytest.mark.parametrize("share", [0.9, 0.99, 1.015, (1.02, 0.012), (0.978, 0.017)])
def test_a_strength_that_is_hardly_or_not_clearly_better_is_not_named(share):
    text = conclusions(**SCALES | {"update x 1.25": share})
    assert "alpha: keep it" in text and "1.25" not in text
    assert "too far" not in text and "short" not in text


def test_the_best_of_five_strengths_must_be_better_by_three_errors():
    """By chance alone one of five is better by two errors in every ninth run."""
    text = conclusions(**SCALES | {"update x 1.25": (1.25, 0.1)})  # by two and a half
    assert "too few held-out examples" in text and "1.25" not in text
    assert "alpha: at x 1.25 " in conclusions(**SCALES | {"update x 1.25": (1.35, 0.1)})


def test_where_the_error_is_large_nobody_can_tell_which_strength_is_better():
    text = conclusions(**SCALES | {"update x 1.25": (1.3, 0.2)})
    assert "too few held-out examples" in text and "1.25" not in text


def test_one_group_of_targets_that_keeps_the_gain_is_named():
    groups = {"attention alone": 0.7, "feed-forward alone": 0.995, "DeltaNet alone": 0.4}
    text = conclusions(**groups)
    assert "targets: " in text and "feed-forward alone keeps" in text


def test_where_no_group_keeps_the_gain_each_ones_share_is_told():
    groups = {"attention alone": 0.7, "feed-forward alone": 0.9, "DeltaNet alone": 0.4}
    text = conclusions(**groups)
    assert all(word in text for word in ("attention 70%", "feed-forward 90%", "DeltaNet 40%"))
    assert "no group alone keeps the whole gain" in text


def test_a_group_that_is_better_alone_is_not_said_to_lose():
    text = conclusions(**{"attention alone": 1.1, "feed-forward alone": 0.5})
    assert "no group alone keeps" not in text and "attention alone has 110%" in text
    assert "do harm" in text and "add" not in text  # the others are no use, and not harmless


def test_what_may_lose_a_tenth_is_not_called_the_same():
    """92 % with an error of 4.9 % may be 82 %, and may be 102 %."""
    text = conclusions(**{"attention alone": 0.4, "feed-forward alone": (0.92, 0.049)})
    assert "alone keeps" not in text and "too few held-out examples" in text
    assert "cut to 4 " not in conclusions(**cuts((0.92, 0.049), 0.5, 0.4))
    text = conclusions(**{"attention alone": 0.4, "feed-forward alone": (0.98, 0.014)})
    assert "feed-forward alone keeps 98%" in text and "less than 5%" in text


@pytest.mark.parametrize("share", [1.25, 0.75])
def test_the_best_of_several_groups_must_differ_by_three_errors(share):
    """By two and a half, which one of three groups may do by chance, better or worse."""
    groups = {"feed-forward alone": 0.5, "DeltaNet alone": 0.4}
    text = conclusions(**groups | {"attention alone": (share, 0.1)})
    assert "too few held-out examples" in text and "attention" not in text
    text = conclusions(**groups | {"attention alone": (share, 0.08)})
    assert ("do harm" in text) == (share > 1) and "attention" in text


def cuts(four, two, one):
    return {"cut to 4 directions": four, "cut to 2 directions": two, "cut to 1 direction": one}


def test_the_smallest_cut_that_keeps_nearly_all_is_named_with_its_limit():
    text = conclusions(**cuts(1.001, 0.99, 0.9))
    assert "r: cut to 2 directions, its strongest, the update keeps 99% of the gain" in text
    assert "another run" in text  # a smaller r that is trained was not tried


def test_a_cut_that_clearly_loses_a_little_asks_for_no_larger_r():
    text = conclusions(**cuts((0.97, 0.001), 0.9, 0.8))
    assert "r: cut to 4 directions, its strongest, the update keeps 97%" in text
    assert "larger LORA_R" not in text


def test_where_every_cut_loses_a_larger_r_may_be_worth_a_run():
    text = conclusions(**cuts(0.9, 0.8, 0.5))
    assert "r: cut to 4 " in text and "larger LORA_R" in text


def test_a_cut_that_is_clearly_better_does_not_lose():
    text = conclusions(**cuts(1.1, 1.05, 0.6))
    assert (
        "r: cut to 2 directions, its strongest, the update keeps" in text
        and "larger LORA_R" not in text
    )


def test_no_cut_is_called_enough_where_a_milder_one_clearly_loses():
    """The errors of the stronger cut hide what it loses."""
    text = conclusions(**cuts(0.94, 0.9, (0.97, 0.04)))
    assert "the update keeps" not in text.replace("keeps only", "")


def test_a_large_loss_that_is_not_clear_is_not_said_to_be_nothing():
    """With few examples half of the gain may be lost, and nobody could tell."""
    text = conclusions(**cuts(0.97, 0.9, (0.5, 0.3)))
    assert "cut to 1 " not in text
    assert "too few held-out examples" in conclusions(**cuts((0.9, 0.3), (0.9, 0.3), (0.5, 0.3)))
    text = conclusions(**{"attention alone": (0.6, 0.3), "feed-forward alone": 0.5})
    assert "alone keeps" not in text and "too few held-out examples" in text


def test_without_a_clear_gain_nothing_is_said_of_the_parts():
    text = conclusions((0.01, 0.02), **SCALES | cuts(1, 1, 1) | {"update x 1.25": 1.5})
    assert "not better than the base model" in text
    assert not re.search("^(alpha|r|targets):", text, re.MULTILINE)


# ==== Kinds, and the worst examples


def test_kinds_have_examples_losses_difference_and_error(deep):
    losses = record_of(deep.output)["evidence"]["losses"]
    head, *lines = section(log_of(deep.output), "kinds")
    assert head.startswith("kind ") and "lower on" in head
    expected = {}
    for row in losses:
        expected.setdefault(row["group"] or "(none)", []).append(row)
    sizes = {name: len(rows) for name, rows in expected.items()}
    assert sizes == {"loss": 3, "plain": 3, "(none)": 2, "chat": 2, "worry": 1}
    assert [sizes[line.split()[0]] for line in lines] == [3, 3, 2, 2, 1]  # the largest first
    for line in lines:
        rows = expected.pop(line.split()[0])
        n, base, adapter = (
            np.array([r[key] for r in rows]) for key in ("tokens", "base", "adapter")
        )
        before, after = (base * n).sum() / n.sum(), (adapter * n).sum() / n.sum()
        numbers = [f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"]
        where = [row["where"] for row in rows]  # the two replies of "(none)" are of one line
        sums = [
            [
                sum(one for one, place in zip(each, where, strict=True) if place == line_of)
                for line_of in dict.fromkeys(where)
            ]
            for each in ((adapter - base) * n, n)
        ]
        if len(set(where)) > 1:
            numbers[-1] += f" ± {standard_error(*sums):.4f}"
        numbers += [f"{(adapter < base).sum()}/{len(rows)}"]
        assert line.split(maxsplit=2)[2].split() == " ".join(numbers).split()
    assert not expected


def test_the_three_worst_examples_are_named_by_file_and_line(deep):
    losses = record_of(deep.output)["evidence"]["losses"]
    worst = sorted(losses, key=lambda row: row["base"] - row["adapter"])[:3]
    _, *lines = section(log_of(deep.output), "worst")
    changes = [f"{row['where']} ({row['adapter'] - row['base']:+.2f})" for row in worst]
    assert lines == changes and all(re.match(r"\S+eval\.jsonl:\d+ ", line) for line in lines)


# ==== The size of the updates


def update_by_hand(update, weight):
    """Return size against W, and directions, by numpy's SVD of the whole product."""
    energy = np.linalg.svd(update, compute_uv=False) ** 2
    shares = energy.cumsum() / energy.sum()
    size = np.linalg.norm(update) / np.linalg.norm(weight)
    return {"update": size, "directions": int((shares < 0.9).sum()) + 1}


def test_run_json_tells_each_modules_update_as_numpys_svd_does(by_hand):
    learned = by_hand.record["learned"]
    expected = {}
    for path, (scale, b, a) in by_hand.factors.items():
        weight = by_hand.weights[f"{path}.weight"].double().numpy()
        key = path.rpartition(".")[2], int(re.search(r"layers\.(\d+)\.", path)[1])
        expected[key] = update_by_hand(scale * b @ a, weight)
    found = {(target, row["layer"]): row for target, rows in learned.items() for row in rows}
    assert found.keys() == expected.keys()
    for key, row in found.items():
        assert {name: row[name] for name in expected[key]} == pytest.approx(expected[key], rel=1e-5)


def test_the_printed_line_names_the_smallest_and_largest_update(by_hand):
    learned = by_hand.record["learned"]
    means = {target: np.mean([row["update"] for row in rows]) for target, rows in learned.items()}
    text = "\n".join(section(log_of(by_hand.output), "learned"))
    found = {target: float(number) for number, target in re.findall(r"([\d.]+) % \((\w+)\)", text)}
    for target in (min(means, key=means.get), max(means, key=means.get)):
        assert found.pop(target) == pytest.approx(100 * means[target], rel=0.05)  # two digits
    assert not found


def small_net(shapes, dtype=torch.float32, **lora):
    """Return LoRA with random A and B over one up_proj of d x k a layer, and these modules."""
    model = torch.nn.Module()
    layers = [
        torch.nn.ModuleDict({"up_proj": torch.nn.Linear(k, d, bias=False)}) for d, k in shapes
    ]
    model.layers, model.head = torch.nn.ModuleList(layers), torch.nn.Linear(3, 3)
    config = peft.LoraConfig(target_modules=["up_proj"], **lora)
    adapted = peft.get_peft_model(model.to(dtype), config)
    modules = [layer["up_proj"] for layer in adapted.base_model.model.layers]
    for module in modules:
        torch.nn.init.normal_(module.lora_B["default"].weight)
    return adapted, modules


@pytest.mark.parametrize(("r", "alpha"), [(8, 16), (1, 4), (50, 50)])
def test_updates_of_any_shape_and_rank_are_measured(r, alpha):
    """Also where r is larger than the matrix, and W is in bfloat16."""
    torch.manual_seed(1)
    model, modules = small_net([(40, 50), (3, 30), (30, 3)], torch.bfloat16, r=r, lora_alpha=alpha)
    rows = inspect_lora.measure_updates(model)["up_proj"]
    for number, (row, module) in enumerate(zip(rows, modules, strict=True)):
        weight = module.get_base_layer().weight.detach().double().numpy()
        a, b = (
            matrix["default"].weight.detach().double().numpy()
            for matrix in (module.lora_A, module.lora_B)
        )
        expected = {"layer": number} | update_by_hand(alpha / r * b @ a, weight)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_a_large_w_in_bfloat16_is_measured_in_float64():
    """Float32 sums of so many squares lose a thousandth."""
    torch.manual_seed(2)
    model, (module,) = small_net([(4096, 4096)], torch.bfloat16, r=1, lora_alpha=1)
    (row,) = inspect_lora.measure_updates(model)["up_proj"]
    a, b = (m["default"].weight.double().norm() for m in (module.lora_A, module.lora_B))
    weight = module.get_base_layer().weight.double().norm()
    assert row["update"] == pytest.approx((a * b / weight).item(), rel=1e-5)


def test_no_update_has_size_0_and_no_directions():
    model, (module,) = small_net([(40, 50)], r=8, lora_alpha=16)
    module.lora_B["default"].weight.data.zero_()
    row = {"layer": 0, "update": 0, "directions": 0}
    assert inspect_lora.measure_updates(model) == {"up_proj": [row]}


# ==== samples.md


def read_samples(output):
    """Return [(heading, {who: text})] of samples.md; a line out of place is an error."""
    found = []
    for line in (output / "samples.md").read_text(encoding="utf-8").splitlines()[3:]:
        if line.startswith("## "):
            found.append((line[3:], {}))
        elif bold := re.fullmatch(r"\*\*(.+)\*\*", line):
            who = found[-1][1].setdefault(bold[1], [])
        elif line.startswith("> "):
            who.append(line[2:])
        else:
            assert not line, f"out of place: {line!r}"
    return [(head, {who: "\n".join(text) for who, text in said.items()}) for head, said in found]


def test_samples_show_one_of_each_kind_though_fewer_are_asked_for(deep):
    losses = record_of(deep.output)["evidence"]["losses"]
    first = {}
    for row in losses:
        first.setdefault(row["group"], f"{row['where']} {row['group']}".rstrip())
    assert [head for head, _ in read_samples(deep.output)] == [*first.values()]
    assert len(first) == 5


@pytest.mark.parametrize(
    ("kinds", "wanted", "numbers"),
    [
        ("aaaaaaaaab", 4, [0, 2, 5, 9]),
        ("aaaaaaaaab", 1, [0, 9]),
        ("aaaa", 6, [0, 1, 2, 3]),
        ("abcdefghijklmnopqrstuvwxyz", 3, [*range(20)]),
        ("abcdefghijklmnopqrstuvwxyz", 22, [*range(22)]),
    ],
)
def test_samples_are_of_each_kind_up_to_20_and_then_evenly_spread(kinds, wanted, numbers):
    held_out = [t.Example(str(n), [], eval_group=kind) for n, kind in enumerate(kinds)]
    chosen = inspect_lora.choose_samples(held_out, wanted)
    assert [int(example.where) for example in chosen] == numbers


def test_a_reply_ends_at_the_first_of_the_tokens_that_end_a_turn():
    """Gemma has two."""
    assert inspect_lora.before_the_end([5, 8, 9, 7, 9], [7, 9]) == ([5, 8], True)
    assert inspect_lora.before_the_end([5, 8, 9], [7]) == ([5, 8, 9], False)
    assert inspect_lora.before_the_end([7], [7]) == ([], True)


def greedy(model, tokenizer, ids, limit):
    """Return the likeliest reply to one prompt, without generate() and its cache."""
    new = []
    with torch.no_grad():
        while len(new) < limit and tokenizer.eos_token_id not in new:
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
            (best, second), (token, _) = logits.topk(2)
            assert best - second > 1e-5, "rounding could change this choice: take another seed"
            new.append(token.item())
    text = tokenizer.decode(new, skip_special_tokens=True).strip()
    return text if tokenizer.eos_token_id in new else f"{text} [cut here]"


def test_samples_are_what_base_and_adapter_say_to_one_prompt_at_a_time(deep):
    """The script sends prompts of several lengths as one batch, padded on the left."""
    tokenizer = AutoTokenizer.from_pretrained(deep.base)
    record = record_of(deep.output)
    conversations = read_conversations(record["settings"]["EVAL_FILE"])
    chosen = {}
    for row, messages in zip(record["evidence"]["losses"], conversations, strict=True):
        chosen.setdefault(row["group"], messages)
    base = AutoModelForCausalLM.from_pretrained(deep.base, dtype="float32").eval()
    prompts = [render(tokenizer, one[:-1], add_generation_prompt=True) for one in chosen.values()]
    assert len({len(ids) for ids in prompts}) > 2
    replies = {"base model": [greedy(base, tokenizer, ids, 12) for ids in prompts]}
    model = peft.PeftModel.from_pretrained(base, deep.output / "final_lora").eval()
    replies["adapter"] = [greedy(model, tokenizer, ids, 12) for ids in prompts]
    assert len({*replies["base model"], *replies["adapter"]}) > 4
    for number, (_, said) in enumerate(read_samples(deep.output)):
        messages = [*chosen.values()][number]
        assert said["user"] == messages[-2]["content"]
        assert said["reference reply"] == messages[-1]["content"]
        for who, texts in replies.items():
            assert said[who].split() == texts[number].split(), who


def habits_by_hand(texts):
    stopped = sum(not text.endswith("[cut here]") for text in texts)
    words = [text.removesuffix("[cut here]").lower().split() for text in texts]
    triples = [[tuple(w[n : n + 3]) for n in range(len(w) - 2)] for w in words]
    count, different = sum(map(len, triples)), sum(len({*one}) for one in triples)
    share = 1 - different / count if count else 0
    mean = sum(map(len, words)) / len(words)
    texts = {text.removesuffix("[cut here]").strip() for text in texts}
    return {"stopped": stopped, "different": len(texts), "words": mean, "repeated": share}


def test_the_habits_are_those_of_the_replies_in_samples_md(deep):
    lines = log_of(deep.output).splitlines()
    samples = [said for _, said in read_samples(deep.output)]
    for who, name in (("base model", "base"), ("adapter", "adapter")):
        expected = habits_by_hand([said[who] for said in samples])
        assert record_of(deep.output)["samples"][name] == pytest.approx(expected)
        (line,) = [line for line in lines if re.match(rf" {{10}}{name} .* of \d", line)]
        numbers = (
            f"{expected['stopped']} of {len(samples)} {expected['different']} of {len(samples)}"
        )
        numbers += f" {expected['words']:.0f}"
        assert line.split()[1:] == [*numbers.split(), f"{expected['repeated']:.0%}"]


REPLIES = [
    "Well then, well then, well then, good night.<|im_end|>",
    "one that goes on and on and on and on and on and on and on and on and on and on and on",
    "# no heading\n**adapter**\n```\n> quote<|im_end|>",
]


def test_replies_are_quoted_those_cut_are_marked_and_repeats_counted(flags, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    replies = [tokenizer(text)["input_ids"] for text in REPLIES]
    width = max(map(len, replies))
    assert len(replies[1]) == width  # the others end, and are padded

    def generate(self, ids, config, **_):
        assert len(ids) == len(REPLIES) and config.max_new_tokens == 77
        padded = [ids + [config.pad_token_id] * (width - len(ids)) for ids in replies]
        return torch.cat([ids, torch.tensor(padded)], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    t.main([*flags, "--num_samples", "3", "--max_new_tokens", "77", "--max_steps", "1"])
    samples = read_samples(tmp_path / "output")
    expected = [text.removesuffix("<|im_end|>") for text in REPLIES]
    expected[1] += " [cut here]"
    assert [said["adapter"] for _, said in samples] == expected
    habits = record_of(tmp_path / "output")["samples"]["adapter"]
    assert habits == pytest.approx(habits_by_hand(expected))
    assert habits["stopped"] == 2 and habits["repeated"] > 0.4


# ==== lora.png, and LoRA that cannot be taken apart


def drawn_run(tmp_path, *more, train=4, held_out=3):
    """Run one step, with everything on; return its output and what it printed."""
    flags = [*write_short_data(tmp_path, train=train, held_out=held_out), "--num_epochs", "1"]
    flags += ["--output_dir", str(tmp_path / "output"), "--evidence_examples", "9", *more]
    t.main(flags)
    return tmp_path / "output", log_of(tmp_path / "output")


def test_the_picture_of_a_whole_run_is_a_png(finished, deep):
    assert is_png(finished / "lora.png") and is_png(deep.output / "lora.png")


def test_the_mean_of_the_losses_is_drawn_boldly_over_the_single_ones(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, _: figures.append(figure)
    )
    output, _ = drawn_run(tmp_path, "--num_epochs", "4", "--evidence_examples", "0", train=8)
    thin, bold, held_out = figures[0].axes[0].lines
    losses = [entry["loss"] for entry in record_of(output)["loss_history"] if "loss" in entry]
    assert list(thin.get_ydata()) == losses and len(losses) == 8
    pairs = [sum(pair) / 2 for pair in itertools.pairwise(losses)]
    assert list(bold.get_ydata()) == pytest.approx([losses[0], *pairs])
    assert "mean of 2 steps" in bold.get_label() and len(held_out.get_ydata()) == 5
    assert bold.get_linewidth() > 2 * thin.get_linewidth()


@pytest.mark.parametrize("steps", ["1", "3"])
def test_a_run_of_few_steps_has_a_picture(tmp_path, steps):
    output, text = drawn_run(tmp_path, "--max_steps", steps, "--evidence_examples", "0", train=12)
    assert is_png(output / "lora.png") and "\nwarning" not in text


def test_without_held_out_data_nothing_is_measured_but_updates(tmp_path):
    output, text = drawn_run(tmp_path, held_out=0)
    assert is_png(output / "lora.png") and "\nwarning" not in text
    assert "there is no EVAL_FILE" in "".join(section(text, "evidence"))
    record = record_of(output)
    assert record["learned"] and "evidence" not in record
    assert not (output / "samples.md").exists()


def test_evidence_examples_0_measures_no_parts_but_each_examples_loss(tmp_path):
    output, text = drawn_run(tmp_path, "--evidence_examples", "0", "--eval_group", "")
    evidence = record_of(output)["evidence"]
    assert is_png(output / "lora.png") and "\nwarning" not in text
    assert "parts" not in evidence and len(evidence["losses"]) == 3
    assert (
        "update x" not in text and not section(text, "kinds") and len(section(text, "worst")) == 4
    )


def test_an_adapter_that_is_worse_than_the_base_went_too_far():
    """With SmolLM2 eight epochs over 40 conversations ended there; more steps are no advice.

    The same update, weaker, is better than the base.
    """
    weaker = inspect_lora.Estimate(0.2, 0.05)
    text = about_no_gain((-0.5, 0.01), {0.5: weaker, 1.5: inspect_lora.Estimate(-0.7, 0.01)})
    assert "worse than the base model" in text and "went too far" in text
    assert "fewer epochs" in text and "More steps" not in text
    assert not re.search("^(alpha|r|targets):", text, re.MULTILINE)


@pytest.mark.parametrize("weaker", [(0.2, 0.09), (-0.2, 0.01)])
def test_an_adapter_that_is_worse_for_no_reason_in_the_table_is_told_what_to_check(weaker):
    """An update that does harm at every strength does less of it when it is weaker."""
    gained = {0.75: inspect_lora.Estimate(*weaker), 1.25: inspect_lora.Estimate(0.3, 0.01)}
    text = about_no_gain((-0.5, 0.01), gained)
    assert "worse than the base model" in text and "does not show why" in text
    assert "went too far" not in text and "fewer epochs" not in text and "More steps" not in text
    assert "held-out conversations" in text and "template" in text


@pytest.mark.parametrize(
    ("after_epochs", "is_too_long"),
    [
        ({0: 3.7, 10: 3.4, 20: 4.9}, True),
        ({0: 3.7, 10: 4.4, 20: 4.2}, False),  # never better than the base
        ({0: 3.7, 10: 3.6, 20: 3.4}, False),  # best at the end: another held-out file, perhaps
        ({}, False),
    ],
)
def test_training_for_too_long_is_named_where_the_runs_own_losses_show_it(
    after_epochs, is_too_long
):
    worse = {0.5: inspect_lora.Estimate(-0.3, 0.01)}
    text = about_no_gain((-0.5, 0.01), worse, after_epochs)
    said = "lowest after step 10 (3.4000) and rose since: it was trained for too long"
    assert (said in text) == is_too_long == ("does not show why" not in text)


def about_no_gain(gain, gained, after_epochs=None):
    """Return the sentence on strengths with these gains over the base."""
    parts = [
        inspect_lora.Part("strength", strength, f"update x {strength}", contextlib.nullcontext,
                          gained=difference)
        for strength, difference in gained.items()
    ]  # fmt: skip
    gain = inspect_lora.Estimate(*gain)
    return "\n".join(inspect_lora.conclusions(parts, gain, 10, after_epochs))


def test_a_weaker_update_that_is_clearly_better_than_the_base_shows_a_run_that_went_too_far():
    text = about_no_gain((0.01, 0.02), {0.5: inspect_lora.Estimate(0.3, 0.05)})
    assert "not better than the base model" in text and "fewer epochs" in text
    text = about_no_gain((0.01, 0.02), {0.5: inspect_lora.Estimate(0.1, 0.05)})
    assert "More steps" in text and "fewer epochs" not in text


def test_the_best_strength_is_the_best_of_those_that_are_clearly_better():
    """The lowest mean may be noise while another strength is clearly better."""
    text = conclusions(**SCALES | {"update x 2": (1.3, 0.4), "update x 1.25": (1.1, 0.01)})
    assert "alpha: at x 1.25 " in text


def test_a_clearly_worse_half_is_told_though_shorter_cuts_are_unclear():
    assert "uses all its directions" in conclusions(**cuts(0.8, (0.8, 0.3), (0.5, 0.3)))


def test_nine_held_out_lines_support_no_conclusion_and_ten_do():
    text = conclusions(lines=9, **SCALES | cuts(1, 1, 1))
    assert "too few to tell" in text and "9 measured, 10 needed" in text
    assert "alpha" not in text and "alpha: " in conclusions(lines=10, **SCALES)


@pytest.mark.parametrize(
    ("gain", "lines", "is_so"),
    [
        ((1.0, 0.1), 10, True),
        ((1.0, 0.1), 9, False),
        ((0.1, 0.1), 99, False),
        ((-1, 0.1), 99, False),
    ],
)
def test_where_nothing_is_concluded_of_the_parts_nothing_is_of_the_change(gain, lines, is_so):
    """The sentence on a weaker update that moves the model less rests on the parts, too."""
    assert inspect_lora.is_conclusive(inspect_lora.Estimate(*gain), lines) is is_so


def test_a_group_of_targets_with_another_name_is_spoken_of_too():
    text = conclusions(**{"attention alone": 0.4, "model alone": 0.99, "layer 0 alone": 0.3})
    assert "the update of model alone keeps 99%" in text
    text = conclusions(**{"attention alone": 0.4, "conv alone": 0.5, "layers 1 to 2 alone": 0.3})
    assert "attention 40%, conv 50%." in text


def test_a_single_held_out_example_bears_no_error(tmp_path):
    output, text = drawn_run(tmp_path, held_out=1)
    assert is_png(output / "lora.png") and "\nwarning" not in text and "nan" not in text
    assert "too few to tell" in unwrapped(text)
    assert record_of(output)["evidence"]["parts"]["base model"]["against_trained"]["error"] == "inf"


def test_one_layer_with_one_target_is_drawn(tmp_path, edit_lora_config):
    edit_lora_config(layers_to_transform=[1], target_modules=["q_proj"])
    output, text = drawn_run(tmp_path)
    parts = record_of(output)["evidence"]["parts"]
    assert is_png(output / "lora.png") and "\nwarning" not in text
    assert not [label for label in parts if label.endswith("alone")]
    assert "update x 2" in parts and "cut to 1 direction" in parts


def test_dora_is_switched_off_by_parts_but_neither_scaled_nor_cut(tmp_path, edit_lora_config):
    edit_lora_config(use_dora=True)
    output, text = drawn_run(tmp_path)
    record = record_of(output)
    targets = record["settings"]["LORA_TARGET_MODULES"]
    assert is_png(output / "lora.png") and "\nwarning" not in text
    whole, base, *parts = record["evidence"]["parts"]
    assert (whole, base) == ("as trained", "base model")
    groups = {"attention alone", "feed-forward alone"}
    assert {*parts} == groups | {f"{target} alone" for target in targets}
    assert "learned" not in record and "plain LoRA" in "".join(section(text, "learned"))
    assert "neither scaled nor cut" in unwrapped(text)


def test_dora_on_one_layer_is_drawn(tmp_path, edit_lora_config):
    edit_lora_config(use_dora=True, layers_to_transform=[1], target_modules=["q_proj"])
    output, text = drawn_run(tmp_path, "--num_samples", "0")
    assert is_png(output / "lora.png") and "\nwarning" not in text
    assert [*record_of(output)["evidence"]["parts"]] == ["as trained", "base model"]


def test_fully_trained_modules_are_not_taken_apart(tmp_path, edit_lora_config):
    edit_lora_config(modules_to_save=["norm"])
    output, text = drawn_run(tmp_path)
    assert is_png(output / "lora.png") and "\nwarning" not in text
    assert [*record_of(output)["evidence"]["parts"]] == ["as trained", "base model"]
    assert "not taken apart" in unwrapped(text)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of lora_bias
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({}, []),
        ({"use_dora": True}, ["neither scaled nor cut"]),
        ({"lora_bias": True}, ["neither scaled nor cut"]),
        ({"modules_to_save": ["head"]}, ["not taken apart"]),
    ],
)
def test_one_sentence_says_what_is_not_measured(more, said):
    model, _ = small_net([(4, 5)], r=2, **more)
    sentences = inspect_lora.what_is_not_measured(model)
    assert len(sentences) == len(said)
    assert all(text in sentence for text, sentence in zip(said, sentences, strict=True))


# ==== An error costs nothing


def test_an_error_in_every_part_is_a_warning_and_the_adapter_is_whole(
    flags, tmp_path, monkeypatch, capsys
):
    def fails(error):
        def fail(*_, **__):
            raise error

        return fail

    losses = t.example_losses

    def example_losses(model, examples, tokens_at_once, title):
        if title == "base":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(model, examples, tokens_at_once, title)

    monkeypatch.setattr(t, "example_losses", example_losses)
    monkeypatch.setattr(torch.linalg, "svdvals", fails(torch.linalg.LinAlgError("no convergence")))
    monkeypatch.setattr(GenerationMixin, "generate", fails(IndexError("a bug upstream")))
    picture = fails(OSError(28, "No space left"))
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", picture)
    t.main(flags)  # exits with no status
    output, text = tmp_path / "output", capsys.readouterr().out
    warnings = section(text, "warning")
    errors = ["no convergence", "out of memory", "a bug upstream", "No space left"]
    for error, line in zip(errors, warnings, strict=True):
        assert error in line and "the adapter is complete" in line
    assert "Traceback" in log_of(output) and "Traceback" not in text
    assert record_of(output)["outcome"] == "finished" and section(text, "done")
    assert not (output / "lora.png").exists() and not (output / "samples.md").exists()
    base = AutoModelForCausalLM.from_pretrained(TINY)
    peft.PeftModel.from_pretrained(base, output / "final_lora")


@pytest.mark.parametrize("label", ["update x 0.5", "attention alone", "cut to 2 directions"])
def test_an_error_amid_a_changed_adapter_changes_it_back(flags, tmp_path, monkeypatch, label):
    seen = types.SimpleNamespace(output=tmp_path / "output")
    losses = t.example_losses
    watch_adapter(monkeypatch, seen)

    def example_losses(model, examples, tokens_at_once, title):
        if title == label:
            assert not is_as_before(seen)
            raise RuntimeError(f"amid {label}")
        return losses(model, examples, tokens_at_once, title)

    monkeypatch.setattr(t, "example_losses", example_losses)
    t.main([*flags, "--evidence_examples", "2", "--num_samples", "0", "--max_steps", "1"])
    (line,) = section(log_of(seen.output), "warning")
    assert f"amid {label}" in line and is_as_before(seen)
