"""What is known of how an adapter was trained: one name for each setting, whoever trained it."""

import shutil

import pytest
import toys
from records import say_origin
from toys import TENSORS, change_config, edit_json, save_adapter

from inspect_lora.adapter import read_adapter
from inspect_lora.training import known_settings


def known(folder):
    return known_settings(read_adapter(folder))


def differing(first, second):
    first, second = (known(folder) for folder in (first, second))
    return {key for key in first | second if first.get(key, "?") != second.get(key, "?")}


@pytest.mark.parametrize(
    "spelling",
    [
        sorted(toys.PLAIN["target_modules"], reverse=True),
        r".*layers\.\d+\.(self_attn|linear_attn|mlp)\.(q_proj|o_proj|in_proj_qkv|out_proj|up_proj|down_proj)",
        r"(?:.*?(?:language|text).*?(?:self_attn|linear_attn|mlp).*?)",
        [*toys.PLAIN["target_modules"], "v_prj"],
    ],
    ids=["a list in another order", "an expression", "Unsloth's", "one that led to no module"],
)  # fmt: skip
def test_other_spellings_of_the_same_targets_are_no_difference(adapters, copied, spelling):
    other = copied(target_modules=spelling, inference_mode=False, peft_version="0.17.0")
    assert differing(adapters["plain"], other) == set()


def test_names_of_a_wrapper_are_no_difference(adapters):
    assert differing(adapters["plain"], adapters["wrapper"]) == set()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({"use_dora": True}, {"use_dora"}), ({"modules_to_save": ["norm"]}, {"modules_to_save"}),
        ({"use_rslora": True}, {"use_rslora"}), ({"lora_dropout": 0.1}, {"lora_dropout"}),
        ({"rank_pattern": {"q_proj": 2}}, {"rank_pattern"}), ({"lora_alpha": 4}, {"lora_alpha"}),
        ({"layers_to_transform": [1]}, {"modules"}),
        ({"target_modules": ["q_proj"]}, {"modules", "target_modules"}),
    ],
    ids=lambda value: "" if isinstance(value, set) else str(value),  # a set's order varies
)  # fmt: skip
def test_what_peft_was_asked_for_is_known(adapters, tmp_path, config, names):
    other = save_adapter(tmp_path / "other", **config)
    found = differing(adapters["plain"], other)
    assert names <= found <= names | {"modules", "target_modules"}


def test_a_key_that_a_file_lacks_has_pefts_own_value(adapters, copied):
    """As in files of older versions of PEFT."""
    other = copied()
    lacking = ("use_dora", "modules_to_save", "rank_pattern", "bias", "use_rslora", "lora_bias")
    edit_json(other / "adapter_config.json", lambda own: [own.pop(key) for key in lacking])
    assert differing(adapters["plain"], other) == set()


def test_a_run_brings_the_values_that_it_used(finished, tmp_path):
    """Also those that it did not set, and none that cannot change a result."""
    folder = shutil.copytree(finished.output / "final_lora", tmp_path / "run")
    found = known(folder)
    assert found["SEED"] == 42 and found["LEARNING_RATE"] == 1e-2 and found["r"] == 8
    assert found["WEIGHT_DECAY"] == 0.0 and found["MAX_GRAD_NORM"] == 1.0
    assert found["EXAMPLES IN A STEP"] == 4 and found["START_FROM"] is None
    assert found.keys().isdisjoint({"OUTPUT_DIR", "LORA_R", "EVAL_STEPS", "TRAIN_FILE_NAME"})


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("SFTConfig.weight_decay", 0.1, "WEIGHT_DECAY"), ("SFTConfig.seed", 7, "SEED"),
        ("SFTConfig.neftune_noise_alpha", 5, "NEFTUNE_NOISE_ALPHA"),
        ("chat template", "another", "CHAT TEMPLATE"), ("adapter of START_FROM", "a", "START_FROM"),
    ],
)  # fmt: skip
def test_a_field_that_one_run_sets_is_a_difference(finished, tmp_path, field, value, name):
    """A run without it has TRL's value, which is known, as the plan printed it."""
    folders = [shutil.copytree(finished.output / "final_lora", tmp_path / each) for each in "ab"]
    edit_json(folders[1] / "run.json", lambda record: record["identity"].update({field: value}))
    assert differing(*folders) == {name} and name in known(folders[0])


def test_another_version_of_trl_may_have_other_values(finished, tmp_path):
    folder = shutil.copytree(finished.output / "final_lora", tmp_path / "run")
    edit_json(folder / "run.json", lambda own: own["sessions"][0]["versions"].update(trl="0.1.0"))
    assert "WEIGHT_DECAY" not in known(folder) and "SEED" in known(folder)


def test_of_another_trainer_the_file_alone_is_known(plain):
    say_origin(plain, system_message="You are Nell.")
    assert not [name for name in known(plain) if name.isupper()]
    change_config(plain, r=None)  # PEFT's own value
    assert known(plain)["r"] == 8 and (plain / TENSORS).is_file()
