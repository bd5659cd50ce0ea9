"""inspect_lora.py with any adapter: what is opened, refused, measured and written, and where."""

import copy
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import types

import peft
import pytest
import torch
from by_hand import MergedByHand, read_conversations, reply_loss
from conftest import ROOT, TINY, handlers_restored
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_lora_single as t

inspect_lora = pytest.importorskip("inspect_lora")

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN = {
    "r": 4, "lora_alpha": 32, "use_rslora": True,
    "target_modules": ["o_proj", "down_proj", "out_proj"],
}  # fmt: skip
PLAIN_SCALE = 32 / 4**0.5
SAID = [  # what is said in turn
    ("hello", "Oh, hello."),
    ("rain", "Tea, then?", "no", "A biscuit?"),
    ("beans are up", "Already!"),
    ("who rang?", "Nobody yet."),
]
# The shortest measurement: two examples, no samples, no other tasks.
SHORT = ["--device", "cpu", "--dtype", "float32", "--evidence_examples", "2"]
SHORT += ["--num_samples", "0", "--max_new_tokens", "3", "--general_file", ""]


def messages_of(said):
    roles = ("user", "assistant") * len(said)
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def change_json(path, **values):
    path.write_text(json.dumps(read_json(path) | values), encoding="utf-8")


def listing(folder):
    """Return all that a write below folder would change."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Return a file of four conversations with five replies."""
    path = tmp_path_factory.mktemp("held out") / "held-out.jsonl"
    return write_lines(path, [{"messages": messages_of(said)} for said in SAID])


@functools.cache
def base_model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype="float32").eval()


def save_adapter(folder, std=0.1, **config):
    """Make an adapter with PEFT alone, with a B by chance, and save it as PEFT does."""
    torch.manual_seed(4)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **(PLAIN | config))
    model = peft.get_peft_model(copy.deepcopy(base_model()), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name or (weight.requires_grad and "lora_" not in name):
            weight.data += std * torch.randn_like(weight)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the folder of an adapter that PEFT alone made. Tests must not change it."""
    return save_adapter(tmp_path_factory.mktemp("plain") / "adapter")


@pytest.fixture
def changed(plain, tmp_path):
    """Return a function that gives a copy of that adapter with these entries in its config."""

    def copied(**config):
        folder = shutil.copytree(plain, tmp_path / "changed")
        change_json(folder / CONFIG, **config)
        return folder

    return copied


@pytest.fixture
def inspect(no_picture, monkeypatch, tmp_path, capsys):
    """Return a function that does a command in tmp_path, and gives its status and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        capsys.readouterr()
        status = 0
        try:
            inspect_lora.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return types.SimpleNamespace(status=status, out=out, err=" ".join(err.split()), raw=err)

    return run


@pytest.fixture
def measure(inspect, held_out, tmp_path):
    """Return a function that measures a foreign adapter; it gives what was found, and the end."""

    def run(adapter, *more, eval_file=held_out):
        words = ["--eval_file", eval_file, "--output_dir", tmp_path / "results", *SHORT]
        end = inspect("evidence", adapter, *words, *more)
        assert end.status == 0, end.err
        found = read_json(tmp_path / "results" / "evidence.json")
        return types.SimpleNamespace(found=found, evidence=found["evidence"], **vars(end))

    return run


def losses_of_peft(folder, eval_file, base=None):
    """Return the losses of base and adapter, loaded and switched off by PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    conversations = read_conversations(eval_file)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base or base_model()), folder).eval()
    with_adapter = [reply_loss(model, tokenizer, one) for one in conversations]
    with model.disable_adapter():
        return [reply_loss(model, tokenizer, one) for one in conversations], with_adapter


def columns(evidence):
    """Return the measured losses of base and adapter, example by example."""
    return [[row[name] for row in evidence["losses"]] for name in ("base", "adapter")]


# ==== An adapter of PEFT alone


def test_an_adapter_of_peft_alone_has_the_losses_of_weights_merged_by_hand(
    plain, measure, held_out, tmp_path
):
    """Nothing of the computation on the other side knows the script, TRL or PEFT."""
    before = listing(plain)
    run = measure(plain, "--evidence_examples", "9", "--num_samples", "2")
    merged = MergedByHand(TINY, plain / TENSORS, lambda _: PLAIN_SCALE)
    losses = functools.partial(merged.losses, read_conversations(held_out))
    base, adapter = losses(lambda path: False), losses()
    assert columns(run.evidence) == [
        pytest.approx(base, abs=1e-4),
        pytest.approx(adapter, abs=1e-4),
    ]
    assert max(abs(one - other) for one, other in zip(base, adapter, strict=True)) > 0.03
    expected = {
        "as trained": {}, "base model": {"wanted": lambda path: False},
        "update x 0.5": {"strength": 0.5}, "update x 2": {"strength": 2},
        "attention alone": {"wanted": lambda path: "self_attn" in path},
        "DeltaNet alone": {"wanted": lambda path: "linear_attn" in path},
        "down_proj alone": {"wanted": lambda path: "down_proj" in path},
        "cut to 2 directions": {"divisor": 2}, "cut to 1 direction": {"divisor": 4},
    }  # fmt: skip
    parts = run.evidence["parts"]
    for title, how in expected.items():
        assert parts[title]["losses"] == pytest.approx(losses(**how), abs=1e-4), title
    kinds = [parts[title]["kind"] for title in expected]
    assert kinds == ["whole", "base", *["strength"] * 2, *["group"] * 2, "target", *["cut"] * 2]
    assert run.found["adapter"] == str(plain) and run.found["base"] == TINY
    assert "r = 4, alpha = 32 on 4 modules\n" in run.out
    assert listing(plain) == before  # nothing is written into the adapter's folder
    names = {path.name for path in (tmp_path / "results").iterdir()}
    assert names == {"evidence.json", "samples.md", "lora.png"}


def test_what_was_found_before_is_renamed_and_not_overwritten(plain, measure, tmp_path):
    first, second = measure(plain), measure(plain, "--max_seq_len", "99")
    (old,) = (tmp_path / "results").glob("evidence.json.*")
    assert read_json(old) == first.found and first.found["evidence"] == second.evidence


def test_the_picture_of_a_foreign_adapter_has_no_losses_and_names_the_adapter(
    plain, measure, monkeypatch
):
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, _: figures.append(figure)
    )
    measure(plain)
    titles = [axes.get_title() for axes in figures[0].axes]
    assert [one for one in titles if one] == [
        "Where the model was changed", "At another strength", "Which part?",
    ]  # fmt: skip
    assert figures[0].get_suptitle().endswith("r = 4, alpha = 32, adapter")


# ==== Other kinds of LoRA

SCALED = {"strength", "cut"}
GROUPS = {"group", "target"}
VARIANTS = {
    "plain": ({}, SCALED | GROUPS, []),
    "DoRA": ({"use_dora": True}, GROUPS, ["neither scaled nor cut"]),
    "rank_pattern": (
        {"rank_pattern": {"out_proj": 6, "down_proj": 1}}, SCALED | GROUPS,
        ["and others by pattern"],
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"out_proj": 3}}, SCALED | GROUPS, ["and others by pattern"],
    ),
    "modules_to_save": ({"modules_to_save": ["norm"]}, set(), ["not taken apart"]),
    "trained tokens": ({"trainable_token_indices": [5, 6]}, set(), ["not taken apart"]),
    "all linear layers": ({"target_modules": "all-linear"}, SCALED | GROUPS, []),
    "one layer, one target": (
        {"target_modules": ["down_proj"], "layers_to_transform": [1]}, SCALED, ["on 1 modules"],
    ),
    "by expression": ({"target_modules": r".*mlp\.(up|down)_proj"}, SCALED | {"target"}, []),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, SCALED | GROUPS, []),
    "the head": ({"target_modules": ["lm_head", "down_proj"]}, SCALED | GROUPS, []),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_each_kind_of_lora_has_the_losses_that_peft_alone_gives_it(
    measure, held_out, tmp_path, name
):
    config, kinds, said = VARIANTS[name]
    folder = save_adapter(tmp_path / "adapter", **config)
    run = measure(folder)
    base, adapter = losses_of_peft(folder, held_out)
    assert columns(run.evidence) == [
        pytest.approx(base, abs=1e-4),
        pytest.approx(adapter, abs=1e-4),
    ]
    assert abs(sum(base) - sum(adapter)) > 1e-3
    found = {part["kind"] for part in run.evidence["parts"].values()}
    assert found == kinds | {"whole", "base"}
    assert all(text in " ".join(run.out.split()) for text in said)
    assert ("learned" in run.found) == bool(kinds & SCALED)


def test_a_cut_halves_each_layers_own_rank(measure, held_out, tmp_path):
    """Of the ranks 1, 4 and 6 half is 1 (not 0), 2 and 3."""
    folder = save_adapter(tmp_path / "adapter", rank_pattern={"out_proj": 6, "down_proj": 1})
    run = measure(folder, "--evidence_examples", "9")
    scale = {"out_proj": 32 / 6**0.5, "down_proj": 32, "o_proj": 32 / 4**0.5}
    merged = MergedByHand(TINY, folder / TENSORS, scale.get)
    assert {len(a) for _, _, a in merged.factors.values()} == {1, 4, 6}
    cuts = [part for part in run.evidence["parts"].values() if part["kind"] == "cut"]
    titles = ["cut to 1/2 of the directions", "cut to 1/4 of the directions"]
    assert [part["title"] for part in cuts] == titles
    for divisor, part in zip((2, 4), cuts, strict=True):
        losses = merged.losses(read_conversations(held_out), divisor=divisor)
        assert part["losses"] == pytest.approx(losses, abs=1e-4)


def test_an_adapter_begun_by_eva_is_measured_since_its_base_is_unchanged(changed, measure, plain):
    evidence = measure(changed(init_lora_weights="eva")).evidence
    assert columns(evidence) == columns(measure(plain).evidence)


def test_an_adapter_that_changes_nothing_is_better_nowhere(measure, tmp_path):
    """PEFT's B is 0 at first. There is no gain, so no part has a share of it."""
    path = write_lines(tmp_path / "ten.jsonl", [{"messages": messages_of(SAID[0])}] * 10)
    adapter = save_adapter(tmp_path / "adapter", std=0)
    run = measure(adapter, "--evidence_examples", "10", eval_file=path)
    base, adapter = columns(run.evidence)
    assert base == adapter and run.evidence["better"] == 0
    assert {part["better_on"] for part in run.evidence["parts"].values()} == {0}
    assert "it changes nothing" in run.out and "higher LEARNING_RATE" not in run.out
    assert "\nwarning" not in run.out and "nan" not in run.out


def test_the_head_is_in_no_layer_and_where_nothing_was_gained_nothing_has_a_share(
    measure, tmp_path
):
    config = {"target_modules": ["lm_head", "down_proj"]}
    run = measure(save_adapter(tmp_path / "adapter", std=1, **config))
    parts = run.evidence["parts"]
    assert parts["as trained"]["loss"] > parts["base model"]["loss"]
    assert "lm_head alone" in parts and parts["lm_head alone"]["kind"] == "target"
    assert [row["layer"] for row in run.found["learned"]["lm_head"]] == [None]
    assert "(lm_head) of the size of W" in run.out and "None" not in run.out
    table = run.evidence["table"]
    assert table[2].split()[:2] == ["base", "model"] and table[2].split()[3] == "-"
    assert not any("%" in line for line in table)


# ==== Under a wrapper's names

INTO_WRAPPER = {
    "Qwen3.5's": (".model.model.", ".model.model.language_model."),
    "Gemma 3's of old": (".model.model.", ".model.language_model.model."),
}
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:o_proj|down_proj|out_proj).*?)"
)


def wrapped(folder, form, **config):
    """Rename an adapter's tensors as if it had been trained in a wrapper; return its folder."""
    old, new = INTO_WRAPPER[form]
    tensors = load_file(folder / TENSORS)
    tensors = {name.replace(old, new, 1): one for name, one in tensors.items()}
    assert all("language_model" in name for name in tensors)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    change_json(folder / CONFIG, **config)
    return folder


@pytest.mark.parametrize("targets", ["names", "Unsloth's expression"])
@pytest.mark.parametrize("form", INTO_WRAPPER)
def test_an_adapter_under_a_wrappers_names_is_the_same(plain, changed, measure, form, targets):
    config = {"target_modules": UNSLOTH} if targets != "names" else {}
    if config:
        config["exclude_modules"] = ".*o_proj.*"  # as it was written for other names
    run = measure(wrapped(changed(), form, **config))
    assert columns(run.evidence) == columns(measure(plain).evidence)
    assert "on 4 modules" in run.out


@pytest.mark.parametrize("form", INTO_WRAPPER)
def test_patterns_that_were_written_for_a_wrapper_hold(measure, held_out, tmp_path, form):
    """PEFT alone warns of a pattern that matches nothing, and scales as if there were none."""
    patterns = {"rank_pattern": {"model.layers.0.mlp.down_proj": 2}}
    patterns["alpha_pattern"] = {"model.layers.0.linear_attn.out_proj": 5}
    folder = save_adapter(tmp_path / "adapter", **patterns)
    expected = losses_of_peft(folder, held_out)
    inside = INTO_WRAPPER[form][1].removeprefix(".model.")
    moved = {
        name: {key.replace("model.", inside, 1): value for key, value in pattern.items()}
        for name, pattern in patterns.items()
    }
    run = measure(wrapped(folder, form, **moved))
    assert columns(run.evidence) == [pytest.approx(one, abs=1e-4) for one in expected]


# ==== What finds no place, or does not fit


def add_a_tensor(folder, name):
    tensors = load_file(folder / TENSORS)
    tensors[name] = torch.ones(4, 64)
    save_file(tensors, folder / TENSORS, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",  # no target
        "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight",  # no such layer
        "base_model.model.model.visual.blocks.0.mlp.down_proj.lora_A.weight",
    ],
)
def test_a_tensor_that_finds_no_place_ends_the_command(changed, inspect, held_out, name):
    """PEFT only warns, or says nothing."""
    folder = changed()
    add_a_tensor(folder, name)
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "1 of the 9 tensors" in end.err and name in end.err
    assert str(folder) in end.err and "--base" in end.err and "evidence" not in end.out


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_an_update_of_the_vision_tower_is_left_out_only_if_it_is_0(
    changed, plain, measure, inspect, held_out, value
):
    path = "base_model.model.model.visual.blocks.0.mlp.down_proj"
    folder = changed()
    tensors = load_file(folder / TENSORS)
    tensors[f"{path}.lora_A.weight"] = torch.ones(4, 64)
    tensors[f"{path}.lora_B.weight"] = torch.full((64, 4), value)
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    if value:
        end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
        assert end.status == 1 and "2 of the 10 tensors" in end.err and path in end.err
        return
    run = measure(folder)
    assert f"2 tensors have no place in the text model, such as {path}" in run.out
    assert columns(run.evidence) == columns(measure(plain).evidence)


def test_a_tensor_that_landed_with_other_numbers_ends_the_command(
    plain, inspect, held_out, monkeypatch
):
    load = peft.PeftModel.from_pretrained

    def lossy(*given, **more):
        model = load(*given, **more)
        model.get_parameter(f"{FIRST_B.removesuffix('weight')}default.weight").data[0, 0] += 1e-3
        return model

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", lossy)
    end = inspect("evidence", plain, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "1 of the 8 tensors" in end.err and FIRST_B in end.err


FIRST_B = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


def test_two_tensors_for_one_place_end_the_command(changed, inspect, held_out):
    """One under the text model's name and one under the wrapper's: one of them would be lost."""
    folder = changed()
    tensors = load_file(folder / TENSORS)
    twice = FIRST_B.replace(".model.model.", ".model.model.language_model.")
    tensors[twice] = 2 * tensors[FIRST_B]
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "two tensors for one place" in end.err and FIRST_B in end.err


def test_an_adapter_of_another_size_does_not_fit(changed, inspect, held_out):
    folder = changed()
    tensors = {name: one.repeat(1, 2) for name, one in load_file(folder / TENSORS).items()}
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and f"{folder} does not fit the base model" in end.err
    assert "--base" in end.err


def test_a_file_without_tensors_or_cut_short_is_one_message(changed, inspect, held_out):
    folder = changed()
    save_file({}, folder / TENSORS)
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "holds no tensors" in end.err
    (folder / TENSORS).write_bytes(b"\x10")
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and f"{folder / TENSORS} cannot be read" in end.err


# ==== The base model


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (None, "does not name its base model; give it with --base"),
        ("", "does not name its base model; give it with --base"),
        ("/nowhere/model", "base model /nowhere/model is not there"),
        ("../model", "base model ../model is not there"),
        ("someone/model", "hub cannot be reached, and someone/model is not stored"),
        ("unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit", "--base unsloth/Llama-3.2-1B-Instruct;"),
        ("unsloth/gemma-3-270m-it-bnb-4bit", "--base unsloth/gemma-3-270m-it;"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "--base Qwen/Qwen2.5-7B-Instruct;"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "--base Qwen/Qwen2.5-7B-Instruct;"),
        ("someone/model-FP8-dynamic", "--base someone/model;"),
    ],
)
def test_a_base_that_is_missing_or_quantized_is_asked_for(
    changed, inspect, held_out, monkeypatch, base, said
):
    folder = changed(base_model_name_or_path=base)
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and said in end.err and "--base" in end.err
    assert ("quantized" in end.err) == said.startswith("--base ")


@pytest.mark.parametrize("base", [None, "unsloth/tiny-bnb-4bit", "/nowhere", "someone/model"])
def test_the_base_that_is_given_is_taken_and_named(changed, measure, plain, base):
    run = measure(changed(base_model_name_or_path=base, revision="abc"), "--base", TINY)
    assert columns(run.evidence) == columns(measure(plain).evidence)
    assert run.found["base"] == TINY and f"base model: {TINY}\n" in run.out


@pytest.mark.parametrize(
    ("more", "asked"),
    [
        ([], ("someone/model", "abc")),
        (["--base", "other/model"], ("other/model", "main")),
        (["--base_revision", "v2"], ("someone/model", "v2")),
        (["--base", "other/model", "--base_revision", "v2"], ("other/model", "v2")),
    ],
)
def test_the_hub_is_asked_for_the_right_revision(
    changed, inspect, held_out, monkeypatch, more, asked
):
    seen = []

    def resolve_revision(name, revision):
        seen.append((name, revision))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.resolve_revision", resolve_revision)
    folder = changed(base_model_name_or_path="someone/model", revision="abc")
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT, *more)
    assert end.status == 1 and asked[0] in end.err and seen == [asked]


def test_a_quantized_model_is_refused_by_what_it_holds_too(changed, inspect, held_out, tmp_path):
    model = shutil.copytree(TINY, tmp_path / "model")
    change_json(model / "config.json", quantization_config={"quant_method": "fp8"})
    folder = changed(base_model_name_or_path=str(model))
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "quantized" in end.err


# ==== What is refused by its config


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "IA3"}, "an adapter of the kind IA3; only LORA is understood"),
        ({"bias": "all"}, 'it trained biases (bias="all")'),
        ({"bias": "lora_only"}, 'it trained biases (bias="lora_only")'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa", which changes the base model'),
        ({"init_lora_weights": "pissa_niter_4"}, 'begun with init_lora_weights="pissa_niter_4"'),
        ({"init_lora_weights": "OLoRA"}, 'begun with init_lora_weights="OLoRA"'),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication builds another model"),
        ({"alora_invocation_tokens": [5]}, "works only after its invocation tokens"),
        ({"target_modules": "a.*b", "layers_to_transform": [1]}, "PEFT cannot read it"),
    ],
)
def test_what_cannot_be_compared_with_its_base_is_refused_with_the_reason(
    changed, inspect, held_out, tmp_path, config, said
):
    folder = changed(**config)
    for command in (
        ["evidence", folder, "--eval_file", held_out, *SHORT],
        ["chat", folder, "--device", "cpu"],
    ):
        end = inspect(*command)
        assert end.status == 1 and said in end.err and str(folder) in end.err


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"r": 8}'])
def test_a_damaged_config_is_one_message(changed, inspect, held_out, text):
    folder = changed()
    (folder / CONFIG).write_text(text, encoding="utf-8")
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and f"{folder / CONFIG} is damaged" in end.err


# ==== A folder that is no adapter, and the hub


def test_a_folder_that_is_no_adapter_is_told_what_it_is(inspect, plain, tmp_path, held_out):
    def refusal(name):
        end = inspect("evidence", name, "--eval_file", held_out)
        assert end.status == 1 and str(name) in end.err
        return end.err

    assert "There is no adapter" in refusal(tmp_path / "nowhere")
    assert "There is no adapter" in refusal(held_out)  # a file
    (tmp_path / "empty").mkdir()
    message = refusal(tmp_path / "empty")
    assert "is no adapter: it holds no adapter_config.json" in message
    assert "Did you mean" not in message and "whole model" not in message
    assert f"Did you mean {plain}?" in refusal(plain.parent)
    assert "It looks like a whole model" in refusal(TINY)
    shutil.copy(plain / CONFIG, tmp_path / "empty")
    assert "holds no adapter_model.safetensors, so its weights are missing" in refusal("empty")


@pytest.mark.parametrize("name", ["a", "a folder of quite another length"])
def test_a_pickle_is_not_opened_and_the_printed_command_converts_it(
    changed, inspect, measure, plain, tmp_path, monkeypatch, held_out, name
):
    folder = changed().rename(tmp_path / name)
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT)
    assert end.status == 1 and "a pickle that could run code" in end.err
    command = re.search(r"^python -c '.*'", end.raw, re.M | re.S)[0]
    *_, code = shlex.split(command)
    monkeypatch.chdir(folder)
    exec(compile(code, "printed", "exec"), {})
    monkeypatch.chdir(tmp_path)
    assert columns(measure(folder).evidence) == columns(measure(plain).evidence)


def test_a_name_on_the_hub_is_downloaded_without_checkpoints(
    plain, inspect, held_out, monkeypatch, tmp_path
):
    seen = []

    def snapshot_download(name, allow_patterns, ignore_patterns):
        seen.append((name, set(allow_patterns), ignore_patterns))
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    end = inspect("evidence", "someone/adapter", "--eval_file", held_out, *SHORT)
    assert end.status == 0 and [name for name, _, _ in seen] == ["someone/adapter"]
    assert {"adapter_*", "*.json", "*.jinja"} <= seen[0][1] and seen[0][2] == ["checkpoint-*"]
    found = read_json(tmp_path / "output" / "inspected" / "someone--adapter" / "evidence.json")
    assert found["adapter"] == "someone/adapter"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            LocalEntryNotFoundError("offline"),
            "cannot be reached, and someone/adapter is not stored",
        ),
        (OSError("disk"), "no adapter of this name on the hub"),
    ],
)
def test_an_adapter_that_the_hub_does_not_give_is_one_message(
    inspect, monkeypatch, held_out, error, said
):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    end = inspect("evidence", "someone/adapter", "--eval_file", held_out)
    assert end.status == 1 and said in end.err


# ==== The held-out conversations


def test_without_held_out_conversations_they_are_asked_for(plain, inspect, tmp_path):
    """The shipped ones say nothing about an adapter of somebody else."""
    for command in (["evidence", plain, *SHORT], ["evidence", plain, *SHORT, "--eval_file", ""]):
        end = inspect(*command)
        assert end.status == 1 and "--eval_file" in end.err and "README.md" in end.err
    end = inspect("evidence", plain, *SHORT, "--eval_file", "nowhere.jsonl")
    assert end.status == 1 and "There is no file nowhere.jsonl" in end.err
    assert not [*tmp_path.iterdir()]


def test_a_bad_line_is_reported_before_any_large_library_is_imported(plain, tmp_path):
    path = write_lines(tmp_path / "bad.jsonl", [{"messages": messages_of(SAID[0])}, {"text": "?"}])
    code = f"""import sys
import inspect_lora
try:
    inspect_lora.main({["evidence", str(plain), "--eval_file", path, *SHORT]!r})
finally:
    print(sorted({{"torch", "transformers", "peft", "matplotlib"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and done.stdout == "[]\n" and "Traceback" not in done.stderr
    assert f"{path}:2: the line has" in done.stderr and "Nothing was measured." in done.stderr


def test_lines_in_the_sharegpt_form_are_taken(plain, measure, tmp_path):
    rows = [{"messages": messages_of(said)} for said in SAID]
    rows[0]["messages"].insert(0, {"role": "system", "content": "Be kind."})
    wanted = measure(plain, eval_file=write_lines(tmp_path / "ours.jsonl", rows)).evidence
    senders = {"user": "human", "assistant": "gpt", "system": "system"}
    for row in rows:
        turns = row.pop("messages")
        row["conversations"] = [
            {"from": senders[turn["role"]], "value": turn["content"]} for turn in turns
        ]
    path = write_lines(tmp_path / "theirs.jsonl", rows)
    assert columns(measure(plain, eval_file=path).evidence) == columns(wanted)


def test_what_was_trained_to_think_is_measured_with_its_thoughts(plain, measure, inspect, tmp_path):
    said = ("hello", "<think>\nwho is it?\n</think>\n\nOh, hello.")
    path = write_lines(tmp_path / "thinks.jsonl", [{"messages": messages_of(said)}])
    evidence = measure(plain, "--enable_thinking", eval_file=path).evidence
    merged = MergedByHand(TINY, plain / TENSORS, lambda _: PLAIN_SCALE)
    losses = merged.losses(read_conversations(path), thinks=True)
    assert columns(evidence)[1] == pytest.approx(losses, abs=1e-4)
    end = inspect("evidence", plain, "--eval_file", path, *SHORT)
    assert end.status == 1 and "<think>" in end.err and "Nothing was measured." in end.err


def test_lines_that_the_template_cannot_render_end_the_command(plain, inspect, tmp_path):
    rows = [{"messages": messages_of(("hello", "Hello <|im_end|>"))}]
    path = write_lines(tmp_path / "bad.jsonl", rows)
    end = inspect("evidence", plain, "--eval_file", path, *SHORT)
    assert end.status == 1 and "bad.jsonl:1" in end.err and "Nothing was measured." in end.err
    path = write_lines(tmp_path / "long.jsonl", [{"messages": messages_of(SAID[0])}])
    end = inspect("evidence", plain, "--eval_file", path, *SHORT, "--max_seq_len", "5")
    assert end.status == 1 and "longer than MAX_SEQ_LEN 5" in end.err


def test_the_key_that_groups_the_lines_is_asked_for_by_flag(plain, measure, tmp_path):
    rows = [{"messages": messages_of(said), "topic": f"t{n}"} for n, said in enumerate(SAID)]
    path = write_lines(tmp_path / "grouped.jsonl", rows)
    run = measure(plain, "--eval_group", "topic", eval_file=path)
    assert {row["group"] for row in run.evidence["losses"]} == {"t0", "t1", "t2", "t3"}
    assert re.search("^kinds     topic ", run.out, re.M)


# ==== Tokenizer and template


def test_an_adapter_with_a_tokenizer_of_its_own_is_measured_with_its_template(
    changed, plain, measure, held_out
):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>", "<thinks>")
    folder = changed()
    tokenizer.save_pretrained(folder)
    run = measure(folder)
    assert "tokenizer and chat template: the adapter's own\n" in run.out
    merged = MergedByHand(TINY, plain / TENSORS, lambda _: PLAIN_SCALE)
    conversations = read_conversations(held_out)
    merged.tokenizer = tokenizer
    assert columns(run.evidence)[1] == pytest.approx(merged.losses(conversations), abs=1e-4)
    run = measure(plain)
    assert "tokenizer and chat template: those of the base model\n" in run.out
    merged.tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert columns(run.evidence)[1] == pytest.approx(merged.losses(conversations), abs=1e-4)


def test_what_a_template_refuses_in_all_lines_is_said_once(changed, inspect, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    folder = changed()
    tokenizer.save_pretrained(folder)
    system = {"role": "system", "content": "Be kind."}
    rows = [{"messages": [system, *messages_of(said)]} for said in SAID]
    path = write_lines(tmp_path / "system.jsonl", rows)
    end = inspect("evidence", folder, "--eval_file", path, *SHORT)
    assert end.status == 1 and "Nothing was measured." in end.err
    assert end.err.count("system.jsonl:") == end.err.count("refuses the system message") == 1


@pytest.mark.parametrize("form", ["in its own file", "in the config", "none"])
def test_a_tokenizer_counts_as_the_adapters_own_if_it_has_a_chat_template(changed, measure, form):
    folder = changed()
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if form != "in its own file":
        (folder / "chat_template.jinja").unlink()
    if form == "in the config":
        change_json(folder / "tokenizer_config.json", chat_template=template)
    whose = "those of the base model" if form == "none" else "the adapter's own"
    assert f"tokenizer and chat template: {whose}\n" in measure(folder).out


def test_a_tokenizer_with_more_tokens_than_the_base_has_is_refused(changed, inspect, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<new>"])
    folder = changed()
    tokenizer.save_pretrained(folder)
    path = write_lines(tmp_path / "new.jsonl", [{"messages": messages_of(("hi", "<new>"))}])
    end = inspect("evidence", folder, "--eval_file", path, *SHORT)
    assert end.status == 1 and "tokens up to 2,048, but the base model has only 2,048" in end.err


# ==== Where results go


def test_results_go_into_a_folder_named_after_the_adapter(plain, inspect, held_out, tmp_path):
    end = inspect("evidence", plain, "--eval_file", held_out, *SHORT)
    assert end.status == 0
    name = f"{plain.parent.name}--{plain.name}"  # many an adapter's folder is called final_lora
    assert (tmp_path / "output" / "inspected" / name / "evidence.json").is_file()
    assert f"output/inspected/{name}/evidence.json" in " ".join(end.out.split())


@pytest.mark.parametrize("where", [".", "results", "nothing given"])
def test_nothing_is_written_into_the_adapters_folder(
    changed, inspect, held_out, monkeypatch, where
):
    folder = changed()
    before = listing(folder)
    words = ["--output_dir", folder / where]
    if where == "nothing given":
        words = []
        monkeypatch.chdir(folder)
    end = inspect("evidence", folder, "--eval_file", held_out, *SHORT, *words)
    assert end.status == 1 and "--output_dir" in end.err and "nothing is written" in end.err
    assert listing(folder) == before


# ==== An adapter of a run


@pytest.fixture
def run_of_ours(finished, tmp_path):
    """Return a copy of the finished run's folder, and its record."""
    output = shutil.copytree(finished, tmp_path / "run")
    return output, read_json(output / "run.json")


def test_a_runs_adapter_needs_no_flags_and_what_was_found_before_is_kept(
    run_of_ours, inspect, finished
):
    output, before = run_of_ours
    adapter = listing(output / "final_lora")
    end = inspect("evidence", output / "final_lora")
    assert end.status == 0 and listing(output / "final_lora") == adapter
    now = read_json(output / "run.json")
    assert now["evidence"]["losses"] == before["evidence"]["losses"]  # to the bit
    assert now["evidence"]["parts"] == before["evidence"]["parts"]
    assert now["learned"].keys() == before["learned"].keys()
    assert now["samples"] == before["samples"]
    kept = {"learned", "evidence", "samples"}
    earlier = now["earlier_findings"]["at the end of the run"]
    assert earlier == {key: before[key] for key in kept}
    new = kept | {"measured", "earlier_findings"}
    assert {k: v for k, v in now.items() if k not in new} == {
        k: v for k, v in before.items() if k not in kept
    }
    assert (output / "samples.md").read_bytes() == (finished / "samples.md").read_bytes()
    assert [*output.glob("samples.md.*")] and [*output.glob("lora.png.*")]
    assert f"what was found is in {output / 'run.json'}" in end.out


def test_the_picture_of_a_runs_adapter_has_its_losses(run_of_ours, inspect, monkeypatch):
    output, record = run_of_ours
    figures = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda figure, _: figures.append(figure)
    )
    assert inspect("evidence", output / "final_lora", *SHORT).status == 0
    axes = figures[0].axes[0]
    losses = [entry["loss"] for entry in record["loss_history"] if "loss" in entry]
    assert axes.get_title() == "Loss" and list(axes.lines[0].get_ydata()) == losses
    assert figures[0].get_suptitle().endswith(f", {record['published']}")


def test_each_measurement_is_kept_under_its_date(run_of_ours, inspect):
    output, record = run_of_ours
    record |= {"measured": "2026-01-01 00:00:00", "earlier_findings": {"once": {"learned": {}}}}
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert inspect("evidence", output / "final_lora", *SHORT).status == 0
    now = read_json(output / "run.json")
    assert [*now["earlier_findings"]] == ["once", "2026-01-01 00:00:00"]
    assert now["earlier_findings"]["once"] == {"learned": {}}
    assert "measured" not in now["earlier_findings"]["2026-01-01 00:00:00"]
    assert "samples" in record and "samples" not in now  # --num_samples 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", now["measured"])
    assert len(now["evidence"]["parts"]["base model"]["losses"]) == 2  # --evidence_examples


def test_another_held_out_file_is_no_part_of_run_json(run_of_ours, inspect, held_out, tmp_path):
    """compare and served read run.json, and take it for a measurement on the run's own file."""
    output, record = run_of_ours
    words = ["--eval_file", held_out, "--output_dir", tmp_path / "elsewhere", *SHORT]
    assert inspect("evidence", output / "final_lora", *words, "--num_samples", "1").status == 0
    assert read_json(output / "run.json") == record
    found = read_json(tmp_path / "elsewhere" / "evidence.json")
    assert len(found["evidence"]["losses"]) == 5
    names = {path.name for path in (tmp_path / "elsewhere").iterdir()}
    assert names == {"samples.md", "lora.png", "evidence.json"}


def test_another_base_is_no_part_of_run_json(run_of_ours, inspect, tmp_path):
    output, record = run_of_ours
    words = ["--base", TINY, "--output_dir", tmp_path / "elsewhere", *SHORT]
    assert inspect("evidence", output / "final_lora", *words).status == 0
    assert read_json(output / "run.json") == record
    assert (tmp_path / "elsewhere" / "evidence.json").is_file()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (RuntimeError("a bug"), 1, "The evidence was not measured; what else was found is in"),
    ],
)
def test_what_was_found_before_an_error_or_ctrl_c_is_kept(
    plain, inspect, held_out, tmp_path, monkeypatch, error, status, said
):
    def fail(*_):
        raise error

    monkeypatch.setattr(inspect_lora, "measure_evidence", fail)
    words = ["--eval_file", held_out, "--output_dir", tmp_path / "results", *SHORT]
    end = inspect("evidence", plain, *words)
    assert end.status == status and said in end.err
    found = read_json(tmp_path / "results" / "evidence.json")
    assert found["learned"] and "evidence" not in found


def test_a_held_out_file_that_is_gone_since_it_was_read_costs_no_evidence(
    run_of_ours, inspect, tmp_path, monkeypatch
):
    output, _ = run_of_ours
    encode = inspect_lora.encode_held_out

    def then_it_is_gone(*given):
        path.unlink()
        return encode(*given)

    path = tmp_path / "eval.jsonl"
    write_lines(path, [{"messages": messages_of(said)} for said in SAID])
    monkeypatch.setattr(inspect_lora, "encode_held_out", then_it_is_gone)
    words = ["--eval_file", path, "--output_dir", tmp_path / "results", *SHORT]
    assert inspect("evidence", output / "final_lora", *words).status == 0
    evidence = read_json(tmp_path / "results" / "evidence.json")["evidence"]
    assert len(evidence["losses"]) == 5 and evidence["eval_sha256"] == ""


def test_an_adapter_whose_run_json_was_renamed_is_known_by_its_hash(run_of_ours, inspect):
    """A newer run has begun in the folder; its record is another's, and stays as it is."""
    output, record = run_of_ours
    (output / "run.json").rename(output / "run.json.2026-01-01-000000")
    other = json.dumps(record | {"adapter_sha256": {"final_lora": "0" * 64}, "outcome": "running"})
    (output / "run.json").write_text(other, encoding="utf-8")
    (output / "run.json.0").write_text("{damaged", encoding="utf-8")
    foreign = {"settings": None, "adapter_sha256": record["adapter_sha256"]}
    (output / "run.json.1").write_text(json.dumps(foreign), encoding="utf-8")
    assert inspect("evidence", output / "final_lora", *SHORT).status == 0
    assert (output / "run.json").read_text(encoding="utf-8") == other
    assert "measured" in read_json(output / "run.json.2026-01-01-000000")


def test_a_checkpoint_is_measured_beside_the_published_adapter(run_of_ours, inspect, tmp_path):
    output, before = run_of_ours
    checkpoint = sorted((output / "checkpoints").glob("checkpoint-*"))[0]
    files = listing(checkpoint)
    end = inspect("evidence", checkpoint, *SHORT, "--num_samples", "1")
    assert end.status == 0 and listing(checkpoint) == files
    now = read_json(output / "run.json")
    found = now.pop("checkpoint_findings")
    assert now == before and [*found] == [checkpoint.name]
    losses = found[checkpoint.name]["evidence"]["losses"]
    first_epoch = next(e["eval_loss"] for e in before["loss_history"] if e.get("step") == 4
                       and "eval_loss" in e)  # fmt: skip
    tokens = sum(row["tokens"] for row in losses)
    loss = sum(row["adapter"] * row["tokens"] for row in losses) / tokens
    assert loss == pytest.approx(first_epoch, abs=1e-4)
    name = f"{output.resolve().name}--{checkpoint.name}"
    folder = tmp_path / "output" / "inspected" / name
    assert checkpoint.name in (folder / "samples.md").read_text(encoding="utf-8")
    assert not (folder / "evidence.json").exists() and "earlier_findings" not in now
    assert inspect("evidence", checkpoint, *SHORT).status == 0
    now = read_json(output / "run.json")
    assert now["earlier_findings"] == {
        f"{checkpoint.name}, {found[checkpoint.name]['measured']}": found[checkpoint.name]
    }


def test_a_checkpoint_is_not_of_the_run_whose_run_json_was_renamed(run_of_ours, inspect):
    output, _ = run_of_ours
    (output / "run.json").rename(output / "run.json.2026-01-01-000000")
    end = inspect("evidence", output / "checkpoints" / "checkpoint-4", *SHORT)
    assert end.status == 1 and "--eval_file" in end.err  # as for any adapter without a run


@pytest.mark.parametrize("what", ["final_lora", "checkpoints/checkpoint-4"])
def test_a_folder_in_which_a_run_is_at_work_keeps_its_run_json(
    run_of_ours, inspect, tmp_path, what
):
    """An epoch may be measured while the training goes on, which writes run.json itself."""
    output, _ = run_of_ours
    text = (output / "run.json").read_bytes()
    with t.locked(output):
        end = inspect("evidence", output / what, *SHORT, "--output_dir", tmp_path / "results")
    assert end.status == 0 and (output / "run.json").read_bytes() == text
    assert "warning" in end.out and "is in use by another run" in " ".join(end.out.split())
    found = read_json(tmp_path / "results" / "evidence.json")
    assert found["evidence"] and found["adapter"] == str(output / what)


def test_a_run_that_was_stopped_during_its_evidence_is_measured_afterwards(
    flags, inspect, tmp_path, monkeypatch, capsys
):
    def stop(*_, **__):
        raise t.Stopped(15, "Stopped.")

    with monkeypatch.context() as patch, handlers_restored(), pytest.raises(SystemExit) as end:
        patch.setattr(inspect_lora, "measure_evidence", stop)
        t.main([*flags, "--max_steps", "1", "--evidence_examples", "2"])
    output = tmp_path / "output"
    record = read_json(output / "run.json")
    assert end.value.code == 128 + 15
    assert record["outcome"] == "finished" and "evidence" not in record and "learned" in record
    assert inspect("evidence", output / "final_lora").status == 0
    now = read_json(output / "run.json")
    assert len(now["evidence"]["losses"]) == 4 and now["samples"] and now["learned"]
    assert (output / "samples.md").is_file()
    end = inspect("compare", output)
    assert f"{now['evidence']['adapter']:.4f}  best" in end.out


def test_a_held_out_file_that_changed_since_the_run_is_told(run_of_ours, inspect, tmp_path):
    output, record = run_of_ours
    old = record["settings"]["EVAL_FILE"]
    path = shutil.copy(old, tmp_path / "eval.jsonl")
    record["settings"]["EVAL_FILE"] = str(path)
    record["data"][str(path)] = record["data"].pop(old)
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert "has changed" not in inspect("evidence", output / "final_lora", *SHORT).out
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    assert (
        f"{path} has changed since the run"
        in inspect("evidence", output / "final_lora", *SHORT).out
    )
    end = inspect("evidence", output / "final_lora", *SHORT, "--eval_file", path)
    assert end.status == 0 and "has changed" not in end.out  # it was asked for


def test_what_a_run_named_from_its_own_folder_is_found_from_another(run_of_ours, inspect, tmp_path):
    """MODEL_NAME and EVAL_FILE are often relative to the folder where the run was started."""
    output, record = run_of_ours
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(record["settings"]["EVAL_FILE"], home / "my-eval.jsonl")
    shutil.copytree(TINY, home / "my-model")
    record |= {"working_folder": str(home)}
    record["settings"] |= {"EVAL_FILE": "my-eval.jsonl", "MODEL_NAME": "my-model"}
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
    change_json(output / "final_lora" / CONFIG, base_model_name_or_path="my-model")
    end = inspect("evidence", output / "final_lora", *SHORT)
    assert end.status == 0, end.err
    assert f"base model: {home / 'my-model'}\n" in end.out and "home/my-eval.jsonl" in end.out
    lines = (home / "my-eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "my-eval.jsonl").write_text(lines[0], encoding="utf-8")  # what is here comes first
    end = inspect("evidence", output / "final_lora", *SHORT)
    assert end.status == 0 and re.search(r"^data +my-eval.jsonl: 1 examples$", end.out, re.M)
    shutil.rmtree(home / "my-model")
    end = inspect("evidence", output / "final_lora", *SHORT)
    assert end.status == 1 and "base model my-model is not there" in end.err


def test_a_setting_of_a_run_json_edited_by_hand_is_one_message(run_of_ours, inspect):
    output, record = run_of_ours
    record["settings"]["MAX_SEQ_LEN"] = "many"
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")
    end = inspect("evidence", output / "final_lora")
    assert end.status == 1 and "MAX_SEQ_LEN is 'many'" in end.err


# ==== for_vllm


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())


def test_vllm_gets_the_same_tensors_under_the_wrappers_names(
    run_of_ours, inspect, finished, tmp_path
):
    """The same as the run itself writes."""
    output, _ = run_of_ours
    end = inspect("for_vllm", output / "final_lora", tmp_path / "served")
    assert end.status == 0 and files_of(tmp_path / "served") == [CONFIG, TENSORS]
    written = load_file(tmp_path / "served" / TENSORS)
    trained = load_file(output / "final_lora" / TENSORS)
    wrapped = {n.replace(".model.model.", ".model.model.language_model."): n for n in trained}
    assert (
        written.keys() == wrapped.keys() == load_file(finished / "final_lora_vllm" / TENSORS).keys()
    )
    assert all(written[name].equal(trained[old]) for name, old in wrapped.items())
    assert read_json(tmp_path / "served" / CONFIG) == read_json(
        finished / "final_lora_vllm" / CONFIG
    )
    assert f"{len(trained)} tensors, each with a place in the base model" in " ".join(
        end.out.split()
    )
    assert f"served={tmp_path / 'served'}" in end.out and "--max-lora-rank 8" in end.out


def test_a_checkpoint_is_written_for_vllm(run_of_ours, inspect, tmp_path):
    output, _ = run_of_ours
    checkpoint = sorted((output / "checkpoints").glob("checkpoint-*"))[0]
    (tmp_path / "served").mkdir()  # an empty folder will do
    assert inspect("for_vllm", checkpoint, tmp_path / "served").status == 0
    written = [*load_file(tmp_path / "served" / TENSORS).values()]
    trained = [*load_file(checkpoint / TENSORS).values()]
    assert len(written) == len(trained)
    assert all(one.equal(other) for one, other in zip(written, trained, strict=True))


def test_a_text_model_without_a_wrapper_keeps_its_names(plain, changed, inspect, tmp_path):
    base_model().save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "text")
    assert inspect("for_vllm", plain, "served", "--base", "text").status == 0
    assert load_file(tmp_path / "served" / TENSORS).keys() == load_file(plain / TENSORS).keys()
    assert read_json(tmp_path / "served" / CONFIG)["base_model_name_or_path"] == "text"


def test_a_regular_expression_becomes_names_for_vllm(changed, inspect, tmp_path):
    folder = wrapped(changed(), "Qwen3.5's", target_modules=UNSLOTH, exclude_modules=".*visual.*")
    end = inspect("for_vllm", folder, tmp_path / "served")
    assert end.status == 0, end.err
    config = read_json(tmp_path / "served" / CONFIG)
    assert config["target_modules"] == ["down_proj", "o_proj", "out_proj"]
    assert config["exclude_modules"] is None
    names = load_file(tmp_path / "served" / TENSORS).keys()
    assert names == load_file(folder / TENSORS).keys()


def test_vllm_gets_nothing_into_a_folder_that_is_in_use(plain, inspect, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for folder in ("used", "used/file"):
        end = inspect("for_vllm", plain, tmp_path / folder)
        assert end.status == 1 and f"{tmp_path / folder} is not empty" in end.err
    assert files_of(tmp_path / "used") == ["file"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "vLLM serves no DoRA adapters"),
        ({"modules_to_save": ["norm"]}, "vLLM serves no adapters with fully trained modules"),
    ],
)
def test_what_vllm_does_not_serve_is_not_written(inspect, tmp_path, config, said):
    folder = save_adapter(tmp_path / "adapter", **config)
    end = inspect("for_vllm", folder, tmp_path / "served")
    assert end.status == 1 and said in end.err and "merge" in end.err
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("damage", ["a tensor more", "another size", "no such target"])
def test_what_has_no_place_in_the_base_is_not_written(changed, inspect, tmp_path, damage):
    folder = changed(**({"target_modules": ["c_attn"]} if damage == "no such target" else {}))
    if damage == "a tensor more":
        add_a_tensor(folder, "base_model.model.model.layers.7.mlp.down_proj.lora_A.weight")
    elif damage == "another size":
        tensors = {name: one.repeat(1, 2) for name, one in load_file(folder / TENSORS).items()}
        save_file(tensors, folder / TENSORS, {"format": "pt"})
    end = inspect("for_vllm", folder, tmp_path / "served")
    said = {
        "a tensor more": "1 of the 9 tensors", "another size": "8 of the 8 tensors",
        "no such target": "does not fit its base model",
    }  # fmt: skip
    assert end.status == 1 and said[damage] in end.err and str(folder) in end.err
    assert not (tmp_path / "served").exists()


def test_what_was_written_for_vllm_is_read_again(plain, inspect, tmp_path, monkeypatch):
    def lossy(tensors, *given):
        tensors = {name: one.clone() for name, one in tensors.items()}
        next(iter(tensors.values()))[0, 0] += 1
        return save_file(tensors, *given)

    monkeypatch.setattr("safetensors.torch.save_file", lossy)
    end = inspect("for_vllm", plain, tmp_path / "served")
    assert end.status == 1 and "does not hold the adapter's tensors" in end.err


# ==== The command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ""),
        (["evidense", "x"], "there is no command evidense; did you mean evidence?"),
        (["train"], "there is no command train; there are evidence, chat, compare,"),
        (["--device", "cpu"], "invalid choice: 'cpu'"),
        (["evidence"], "the following arguments are required: ADAPTER"),
        (["for_vllm", "x"], "the following arguments are required: FOLDER"),
        (["compare"], "the following arguments are required: FOLDER"),
        (["evidence", "x", "--eval", "y"], "unrecognized arguments: --eval y"),
        (["evidence", "x", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["evidence", "x", "--max_seq_len", "long"], "it must be a whole number, such as 100"),
        (["chat", "x", "--eval_file", "y"], "unrecognized arguments: --eval_file y"),
        (["for_vllm", "x", "y", "--device", "cpu"], "unrecognized arguments: --device cpu"),
        (["compare", "x", "--lora_r", "8"], "unrecognized arguments: --lora_r 8"),
    ],
)
def test_a_wrong_command_or_flag_exits_with_2(inspect, words, said):
    end = inspect(*words)
    assert end.status == 2 and said in end.err
    if not words:
        assert all(f"\n    {name} " in end.out for name in inspect_lora.COMMANDS)


def test_hyphens_will_do_for_underscores(plain, inspect, held_out, tmp_path):
    words = ["--eval-file", held_out, f"--output-dir={tmp_path / 'a-b'}"]
    assert inspect("evidence", plain, *words, *SHORT).status == 0
    assert (tmp_path / "a-b" / "evidence.json").is_file()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("max_seq_len", 0), ("max_new_tokens", 0), ("evidence_examples", -1), ("num_samples", -1)],
)
def test_a_number_that_makes_no_sense_is_one_message(plain, inspect, held_out, flag, value):
    end = inspect("evidence", plain, "--eval_file", held_out, *SHORT, f"--{flag}", value)
    assert end.status == 1 and f"--{flag} is {value}" in end.err and "at least" in end.err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "Stopped."),
        (SystemExit("A sentence."), 1, "A sentence."),
        (ModuleNotFoundError("no", name="peft"), 1, "pip install -r requirements.txt"),
    ],
)
def test_what_ends_a_command_is_a_message_and_a_status(
    inspect, plain, held_out, monkeypatch, error, status, said
):
    def fail(*_):
        raise error

    monkeypatch.setattr(inspect_lora, "find_adapter", fail)
    end = inspect("evidence", plain, "--eval_file", held_out)
    assert end.status == status and said in end.err


def test_an_error_that_is_not_known_keeps_its_traceback(inspect, plain, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(inspect_lora, "find_adapter", fail)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        inspect("evidence", plain)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/Qwen3-4B-unsloth-bnb-4bit", "unsloth/Qwen3-4B"),
        ("someone/Model-AWQ", "someone/Model"),
        ("someone/Model-w4a16", "someone/Model"),
        ("someone/Model-GPTQ-Int4", "someone/Model"),
        ("someone/Model.nvfp4", "someone/Model"),
        ("runs_8bit/Qwen3", None),
        ("someone/Model-fp8less", None),
    ],
)
def test_the_name_of_a_quantized_copy_is_known_by_its_end(name, plain):
    found = inspect_lora.QUANTIZED_NAME.search(name)
    assert (name[: found.start()] if found else None) == plain


def test_tasks_that_are_asked_for_must_be_there(plain, inspect, held_out):
    words = [*SHORT, "--eval_file", held_out, "--general_file", "no/such.jsonl"]
    end = inspect("evidence", plain, *words)
    assert end.status == 1 and "no/such.jsonl" in end.err
