"""Any adapter is opened as it was trained, or refused with the reason."""

import functools
import re
import shutil
import types

import pytest
import torch
import toys
from by_hand import ROUNDING, MergedByHand, losses_of_peft, read_conversations
from conftest import TOY
from records import SHORT, evidence, mean_losses, planned, say_origin
from runs import SYSTEM, files, refused, replace_ours, talk, write_lines
from safetensors.torch import load_file
from toys import PLAIN_SCALE, PREFIX, TENSORS, change_config, change_tensors, save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from inspect_lora.__main__ import main
from inspect_lora.adapter import TO_WRAPPER, name_in_text_model, read_adapter, renamed
from inspect_lora.plan import system_of
from train_lora.console import UserError
from train_lora.conversations import Conversation
from train_lora.saving import name_in_wrapper

EMBEDDING = f"{PREFIX}model.embed_tokens.weight"
A, B = (f"{PREFIX}model.layers.1.mlp.up_proj.lora_{part}.weight" for part in "AB")
VISION = f"{PREFIX}model.visual.blocks.0.mlp.down_proj.lora_"


@pytest.fixture
def measured(capfd, three_lines, tmp_path):
    def measure(adapter, *words):
        shutil.rmtree(tmp_path / "results", ignore_errors=True)
        words = ["--eval_file", three_lines, *SHORT, *words]
        return evidence(capfd, adapter, tmp_path / "results", *words)[0]

    return measure


@pytest.fixture
def not_measured(capfd, three_lines, tmp_path):
    def measure(adapter, *keys, more=()):
        results = tmp_path / "no results"
        argv = ["evidence", adapter, "--eval_file", three_lines, "--device", "cpu", *SHORT]
        end = refused(capfd, [*argv, "--output_dir", results, *more], *keys, main=main)
        assert not results.exists() and "gain" not in end.out

    return measure


def near(losses):
    return pytest.approx(losses, abs=ROUNDING)


def by_peft(folder, path, base=TOY):
    """Return the losses that PEFT alone gives an adapter, which changes them."""
    base, adapter = losses_of_peft(folder, read_conversations(path), base=base)
    assert base[0] != pytest.approx(adapter[0], abs=20 * ROUNDING)
    return [near(base), near(adapter)]


@pytest.fixture(scope="module")
def of_plain(adapters, three_lines):
    """Return the losses of base and plain adapter by PEFT alone."""
    return by_peft(adapters["plain"], three_lines)


def test_losses_parts_and_cuts_are_those_of_weights_merged_by_hand(adapters, measured, three_lines):
    """Nothing on the other side knows the script, TRL or PEFT. Ranks 1, 4 and 6 are halved each."""
    folder = adapters["rslora"]
    before = files(folder)
    found = measured(folder, "--parts", 9)
    assert files(folder) == before
    scale = {"out_proj": 3 / 6**0.5, "down_proj": 8}
    merged = MergedByHand(TOY, folder / TENSORS, lambda target: scale.get(target, 8 / 4**0.5))
    assert {len(a) for _, _, a in merged.factors.values()} == {1, 4, 6}
    conversations = read_conversations(three_lines)
    base = merged.losses(conversations, wanted=lambda path: False)
    assert mean_losses(found) == [near(base), near(merged.losses(conversations))]
    expected = {
        ("strength", "x 0.5"): {"strength": 0.5}, ("strength", "x 0.75"): {"strength": 0.75},
        ("strength", "x 1.5"): {"strength": 1.5},
        ("cut", "3 of 6"): {"divisor": 2}, ("cut", "1 of 6"): {"divisor": 4},
    }  # fmt: skip
    groups = {"attention": "self_attn", "DeltaNet": "linear_attn", "feed-forward": "mlp"}
    targets = ("q_proj", "o_proj", "in_proj_qkv", "out_proj", "up_proj", "down_proj")
    for name, inside in (groups | dict(zip(targets, targets, strict=True))).items():
        expected["alone", name] = {"wanted": lambda path, inside=inside: inside in path}
        expected["removed", name] = {"wanted": lambda path, inside=inside: inside not in path}
    parts = {(part["family"], part["name"]): part for part in found["parts"]}
    assert parts.keys() == expected.keys()
    tokens = [line["tokens"] for line in found["lines"]]
    for name, how in expected.items():
        own = [loss / n for loss, n in zip(parts[name]["losses"], tokens, strict=True)]
        assert own == near(merged.losses(conversations, **how)), name


FAMILIES = {"strength", "removed", "alone", "cut"}
VARIANTS = {
    "DoRA": ("dora", {}, set()),
    "a whole module": ("whole", {}, set()),
    "trained tokens": ("plain", {"trainable_token_indices": [5, 6]}, set()),
    "all linear layers": ("plain", {"target_modules": "all-linear"}, FAMILIES),
    "the head": ("plain", {"target_modules": ["lm_head", "down_proj"]}, FAMILIES),
    "the embedding": ("plain", {"target_modules": ["embed_tokens", "down_proj"]}, set()),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_each_kind_of_lora_has_the_losses_that_peft_alone_gives_it(
    adapters, measured, three_lines, tmp_path, name
):
    kind, config, kinds = VARIANTS[name]
    folder = save_adapter(tmp_path / "own", **config) if config else adapters[kind]
    found = measured(folder, "--parts", 1)
    assert mean_losses(found) == by_peft(folder, three_lines)
    assert {part["family"] for part in found["parts"]} == kinds


INTO_WRAPPER = {
    "Qwen3.5's": (".model.model.", ".model.model.language_model."),
    "Gemma 3's of old": (".model.model.", ".model.language_model.model."),
}
UNSLOTH = r"(?:.*?(?:language|text).*?(?:self_attn|linear_attn|mlp).*?_(?:proj|qkv))"


def wrapped(folder, form, **config):
    """Rename an adapter's tensors as if it had been trained in a wrapper; return its folder."""
    change_tensors(folder, lambda tensors: toys.renamed(tensors, *INTO_WRAPPER[form]))
    return change_config(folder, **config)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_a_base_that_is_loaded_with_its_vision_tower(measured, three_lines, tmp_path):
    """As AutoModelForCausalLM loads Gemma 3; an adapter may have its text model's names."""
    base = toys.model_of(toys.wrapper("Gemma3"), tmp_path / "gemma", has_weights=True)
    targets = r".*language_model.*\.(q|o|up|down)_proj"
    folder = save_adapter(tmp_path / "own", toys.base_model(folder=base), target_modules=targets)
    expected = by_peft(folder, three_lines, base)
    change_config(folder, alpha_pattern={"language_model.layers.0.mlp.up_proj": 64})
    changed = by_peft(folder, three_lines, base)
    assert changed[1] != expected[1]
    for _ in range(2):
        found = measured(folder, "--base", base)
        assert mean_losses(found) == changed
        renamed = functools.partial(toys.renamed, old=".language_model.layers", new=".layers")
        change_config(
            change_tensors(folder, renamed), alpha_pattern={"model.layers.0.mlp.up_proj": 64}
        )


@pytest.mark.parametrize("form", INTO_WRAPPER)
def test_an_adapter_in_unsloths_form_is_the_same(copied, measured, of_plain, form):
    """Its names are a wrapper's, its targets an expression, its vision tower's updates 0."""
    folder = wrapped(copied(), form, target_modules=UNSLOTH, exclude_modules="(?!.*language).*")
    change_config(folder, base_model_name_or_path="unsloth/tiny-unsloth-bnb-4bit")
    of_vision = {f"{VISION}A.weight": torch.ones(4, 64), f"{VISION}B.weight": torch.zeros(64, 4)}
    change_tensors(folder, lambda tensors: tensors.update(of_vision))
    assert mean_losses(measured(folder, "--base", TOY)) == of_plain


WRITTEN = [  # a path, an expression and an escaped path
    ("Qwen3.5's", lambda path, inside: path.replace("model.", inside, 1)),
    ("Gemma 3's of old", lambda path, _: f".*language_model.*{path.partition('layers.')[2]}"),
    ("Qwen3.5's", lambda path, inside: f"^{re.escape(path.replace('model.', inside, 1))}"),
]


@pytest.mark.parametrize(("form", "way"), WRITTEN)
def test_patterns_that_were_written_for_a_wrapper_hold(measured, three_lines, tmp_path, form, way):
    """PEFT alone warns of a pattern that matches nothing, and scales as if there were none."""
    patterns = {
        "rank_pattern": {"model.layers.0.mlp.down_proj": 2},
        "alpha_pattern": {"model.layers.0.linear_attn.out_proj": 40},
    }
    folder = save_adapter(tmp_path / "own", **patterns)
    expected = by_peft(folder, three_lines)
    inside = INTO_WRAPPER[form][1].removeprefix(".model.")
    for name, pattern in patterns.items():
        patterns[name] = {way(path, inside): value for path, value in pattern.items()}
    assert mean_losses(measured(wrapped(folder, form, **patterns))) == expected


def test_a_target_without_tensors_is_left_as_the_base_has_it(copied, measured, three_lines):
    """Also where PEFT would begin it by chance."""
    folder = copied(init_lora_weights=False)
    change_tensors(folder, lambda own: {k: one for k, one in own.items() if "o_proj" not in k})
    merged = MergedByHand(TOY, folder / TENSORS, lambda _: PLAIN_SCALE)
    expected = merged.losses(read_conversations(three_lines))
    assert mean_losses(measured(folder))[1] == near(expected)


@pytest.mark.parametrize("form", ["of a state_dict", "beside a copy of the base's embedding"])
def test_the_same_adapter_in_another_file_is_the_same(plain, measured, base, of_plain, form):
    """PEFT saves the embedding along in many cases."""
    embedding = {EMBEDDING: base.get_input_embeddings().weight.detach().clone()}
    of_state_dict = functools.partial(toys.renamed, old=".weight", new=".default.weight")
    change = of_state_dict if form == "of a state_dict" else (lambda own: own | embedding)
    assert mean_losses(measured(change_tensors(plain, change))) == of_plain


BAD_TENSORS = {  # what is done to them, and what is named; `info` has the other faults of a file
    "NaN": (lambda own: own | {A: own[A] * float("nan")}, ["NaN:", A[17:]]),
    "a trained vision tower": (
        lambda own: own | {f"{VISION}A.weight": own[A], f"{VISION}B.weight": own[B]}, ["visual"],
    ),
    "another size than the base's": (lambda own: own | {A: torch.ones(4, 100)}, ["up_proj"]),
    "a layer that is not there": (
        lambda own: toys.renamed(own, "layers.1.mlp", "layers.9.mlp"), ["layers.9.mlp"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_what_would_not_be_this_adapter_is_refused(plain, not_measured, name):
    change, keys = BAD_TENSORS[name]
    not_measured(change_tensors(plain, change), *keys)


def test_an_adapter_without_effect_is_refused(copied, not_measured):
    """An activated LoRA waits for tokens that are not sent here."""
    not_measured(copied(alora_invocation_tokens=[5, 6]), "copied")


def test_a_trained_token_of_an_embedding_of_its_own_is_found(untied, tmp_path, not_measured):
    """No ordinary text shows it: this token stands only between the turns."""
    base = AutoModelForCausalLM.from_pretrained(untied, dtype="float32")
    folder = save_adapter(tmp_path / "own", model=base)
    weight = base.get_input_embeddings().weight.detach().clone()
    weight[AutoTokenizer.from_pretrained(untied).convert_tokens_to_ids("<|im_start|>")] += 1
    change_tensors(folder, lambda tensors: tensors.update({EMBEDDING: weight}))
    not_measured(folder, folder.name, more=["--base", untied])


def test_trained_biases_of_the_base_are_refused(tmp_path, not_measured):
    """They stay where the adapter is switched off."""
    base = toys.model_of(toys.family("Qwen2"), tmp_path / "base", has_weights=True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    folder = save_adapter(tmp_path / "own", model, target_modules=["q_proj"], bias="lora_only")
    assert any(name.endswith(".bias") for name in load_file(folder / TENSORS))
    not_measured(folder, "biases")


def test_a_relative_base_is_found_from_another_folder(copied, three_lines, tmp_path, monkeypatch):
    """It was named as seen from where the training was started, above the adapter."""
    base = shutil.copytree(TOY, tmp_path / "project" / "models" / "toy")
    folder = copied(base_model_name_or_path="models/toy")
    folder = shutil.move(folder, tmp_path / "project" / "out" / "adapter")
    monkeypatch.chdir(tmp_path)
    plan = planned(folder, "--eval_file", three_lines, *SHORT)
    assert plan.base.request.name == str(base)


BASES = [  # the adapter's revision, the flags, and what is loaded
    ("main", [], "some/base@main"), ("abc", [], "some/base@abc"),
    ("abc", ["--base_revision", "v2"], "some/base@v2"),
    ("abc", ["--base", "other/base"], "other/base@main"),
]  # fmt: skip


@pytest.mark.parametrize(("revision", "flags", "loaded"), BASES)
def test_the_hub_is_asked_for_the_right_base_and_revision(
    copied, not_measured, monkeypatch, revision, flags, loaded
):
    def read(settings, _):
        raise UserError(f"{settings.name}@{settings.revision}")

    replace_ours(monkeypatch, "read_base", read)
    folder = copied(base_model_name_or_path="some/base", revision=revision)
    not_measured(folder, loaded, more=flags)


def test_a_template_of_the_adapters_own_is_taken_for_both(plain, measured, three_lines):
    """With its own end of a turn, as where a model without a template was trained to chat."""
    own = AutoTokenizer.from_pretrained(TOY)
    own.chat_template = own.chat_template.replace("<|im_start|>", "<|im_start|> ")
    own.save_pretrained(plain)
    found = measured(plain)
    assert found["conditions"]["tokenizer"] == str(plain)
    merged = MergedByHand(TOY, plain / TENSORS, lambda _: PLAIN_SCALE)
    merged.tokenizer = own
    assert mean_losses(found)[1] == near(merged.losses(read_conversations(three_lines)))


def test_nothing_of_an_adapter_is_executed(plain, three_lines, tmp_path):
    """Its tokenizer may name code of its own, which would run wherever it is trusted."""
    marker = tmp_path / "executed"
    AutoTokenizer.from_pretrained(TOY).save_pretrained(plain)
    (plain / "own.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import Qwen2TokenizerFast\n"
        "class Own(Qwen2TokenizerFast):\n    pass\n"
    )
    code = {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    toys.edit_json(plain / "tokenizer_config.json", lambda config: config.update(code))
    AutoTokenizer.from_pretrained(plain, trust_remote_code=True)  # it would
    marker.unlink()
    with pytest.raises((SystemExit, ValueError)):
        main(["evidence", str(plain), "--eval_file", three_lines, "--device", "cpu", *SHORT])
    assert not marker.exists()


SYSTEMS = [  # of the lines, of run.json and of the flag, and what prompts get
    (["Be Nell."] * 2, {}, None, "Be Nell."), (["Be Nell.", "Be Bob."], {}, None, ""),
    (["Be Nell.", None], {}, None, ""), (["Be Nell."] * 2, {"system_message": None}, None, ""),
    (["Be Nell."] * 2, {"system_message": "Be Ann."}, None, "Be Ann."),
    (["Be Nell."] * 2, {}, "Be Eve.", "Be Eve."),
    (["Be Nell."] * 2, {"system_message": "Be Ann."}, "", ""),
]  # fmt: skip


@pytest.mark.parametrize(("systems", "trained", "flag", "expected"), SYSTEMS)
def test_the_system_message_is_the_trainings(plain, systems, trained, flag, expected):
    """Else that of all lines, if they have one."""
    say_origin(plain, **trained)
    heads = [[{"role": "system", "content": one}] if one else [] for one in systems]
    examples = [Conversation(f"a:{n}", [*one, *talk(n)[1:]], {}) for n, one in enumerate(heads)]
    request = types.SimpleNamespace(system=flag)
    assert system_of(request, read_adapter(plain), examples) == expected


def test_a_system_message_is_given_to_the_lines_that_have_none(plain, tmp_path):
    ids = []
    for first, flags in ((0, []), (1, ["--system", SYSTEM])):
        rows = [{"messages": talk(n)[first:]} for n in range(3)]
        path = write_lines(tmp_path / f"{first}.jsonl", rows)
        plan = planned(plain, "--eval_file", path, *SHORT, *flags)
        ids.append([each.example.input_ids for each in plan.held_out])
        assert plan.system == SYSTEM
    assert ids[0] == ids[1]


def test_the_script_and_the_package_rename_alike(adapters):
    """final_lora_vllm is written by the script, which is one file."""
    names = load_file(adapters["plain"] / TENSORS)
    wanted = load_file(adapters["wrapper"] / TENSORS).keys()
    assert {name_in_wrapper(name) for name in names} == wanted
    assert {PREFIX + renamed(name, TO_WRAPPER) for name in names} == wanted
    assert {PREFIX + name_in_text_model(name) for name in wanted} == names.keys()
