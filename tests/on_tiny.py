"""Adapters of the tests' model for the tests of the package, and the command that measures them."""

import copy
import functools
import json
import shutil
import types

import peft
import tiny_adapters
import torch
from by_hand import read_conversations, reply_loss
from conftest import TINY
from tiny_adapters import CONFIG, TENSORS, command
from transformers import AutoModelForCausalLM, AutoTokenizer

from inspect_lora.common import file_sha256

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
# The shortest measurement: nothing but each reply's loss.
SHORT = ["--device", "cpu", "--examples", "0", "--samples", "0", "--general_file", "", "--checks=0"]
PARTS = [*SHORT, "--examples", "9"]


def messages_of(said):
    roles = ("user", "assistant") * len(said)
    return [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_held_out(path, said=SAID):
    """Write conversations, one a line; return the path."""
    return write_lines(path, [{"messages": messages_of(one)} for one in said])


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def listing(folder):
    """Return all that a write below folder would change."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@functools.cache
def base_model(dtype="float32"):
    """Return the base model; nobody changes it."""
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype).eval()


def copy_of_run(finished, output):
    """Return a copy of a finished run's output folder, whose adapter replies otherwise than it did.

    The shipped data, and so what the run learned, must not matter.
    """
    shutil.copytree(finished, output)
    torch.manual_seed(3)
    tiny_adapters.change_tensors(output / "final_lora", lambda tensors: {
        name: torch.randn_like(one) * (0.1 if "lora_B" in name else 0.05)
        for name, one in tensors.items()
    })  # fmt: skip
    know_again(output)
    return output


def know_again(output):
    """Write the hash of the adapter in output into its run.json, as the run does."""
    sha256 = file_sha256(output / "final_lora" / TENSORS)
    change_record(output, adapter_sha256={"final_lora": sha256})


def change_record(output, **values):
    """Change entries of a run.json."""
    record = read_json(output / "run.json") | values
    (output / "run.json").write_text(json.dumps(record), encoding="utf-8")


def save_adapter(folder, std=0.1, **config):
    """Make an adapter of the tests' model with PEFT alone, with a B by chance."""
    return tiny_adapters.save_adapter(folder, model=base_model(), std=std, **(PLAIN | config))


def measure(capsys, adapter, eval_file, *more):
    """Measure an adapter beside its folder; return what was printed and what was found."""
    results = adapter.parent / f"results of {adapter.name}"
    words = ["evidence", adapter, "--eval_file", eval_file, "--output_dir", results, *more]
    end = command(capsys, *words)
    assert end.status == 0, end.err
    found = read_json(results / "evidence.json")
    text = (results / "report.md").read_text(encoding="utf-8")
    return types.SimpleNamespace(found=found, report=text, results=results, **vars(end))


def losses_of_peft(folder, eval_file, dtype="float32"):
    """Return the losses of base and adapter, loaded and switched off by PEFT alone."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    conversations = read_conversations(eval_file)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base_model(dtype)), folder).eval()
    with_adapter = [reply_loss(model, tokenizer, one) for one in conversations]
    with model.disable_adapter():
        return [reply_loss(model, tokenizer, one) for one in conversations], with_adapter


def columns(found):
    """Return the measured losses of base and adapter, example by example."""
    return [[row[name] for row in found["losses"]] for name in ("base", "adapter")]


__all__ = ["CONFIG", "TENSORS"]
