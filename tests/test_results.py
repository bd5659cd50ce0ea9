"""What a run leaves: the adapter and its proof, samples, picture, the summary, run.json."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy
import pytest
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationMixin

import train_lora_single as t

ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
TOKENIZER = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
RESULTS = ("final_lora", "final_lora_vllm", "samples.md", "lora.png")
UP = "base_model.model.model.layers.0.mlp.up_proj"


def read(path):
    return Path(path).read_text(encoding="utf-8")


def record_of(output):
    """Return what run.json holds."""
    return json.loads(read(output / "run.json"))


def contents(path):
    """Return the bytes of a file, or of each file below a folder."""
    if path.is_file():
        return path.read_bytes()
    return {
        str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()
    }


def base_of(name, dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()


@pytest.fixture
def ready(tiny, lines, tmp_path):
    """Return a function that gives (trainer, job) as they are when training is over."""

    def make(*flags):
        output = ["--output_dir", str(tmp_path / "output")]
        args = t.parse_args([*lines(tmp_path), *output, *flags])
        job = t.Job(args)
        job.config, job.tokenizer = t.load_config_and_tokenizer(args)
        for name in ("train", "eval"):
            examples = t.read_examples(str(tmp_path / f"{name}.jsonl"))
            setattr(job, name, t.encode(examples, job.tokenizer, args.max_seq_len))
        job.plan = t.make_plan(args, job.config, len(job.train))
        job.products = t.choose_products(job)
        job.output.mkdir()
        t.find_checkpoint(job)
        trainer = t.build_trainer(job)
        fill(trainer.model)
        return trainer, job

    return make


def fill(model):
    """Give LoRA's B the values that training would."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.fixture
def after_saving(monkeypatch):
    """Return a function that has change(folder) called when final_lora has been saved."""

    def patch(change):
        save = PeftModel.save_pretrained

        def save_and_change(self, folder, *args, **kwargs):
            save(self, folder, *args, **kwargs)
            if Path(folder).name == "final_lora":
                change(Path(folder))

        monkeypatch.setattr(PeftModel, "save_pretrained", save_and_change)

    return patch


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(read(path)) | values), encoding="utf-8")


def change_tensors(folder, edit):
    """Edit the saved tensors in folder with edit(tensors)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


# ==== Files


def test_a_run_leaves_exactly_these_files(demo):
    """Of the checkpoints each epoch's adapter is left; nothing of steps 3 and 6."""
    found = {str(path.relative_to(demo[0])) for path in demo[0].rglob("*") if path.is_file()}
    expected = {"all_logs.log", "run.json", "samples.md", "lora.png"}
    folders = {"final_lora": {"README.md"} | ADAPTER | TOKENIZER, "final_lora_vllm": ADAPTER}
    folders |= {f"checkpoints/checkpoint-{step}": ADAPTER for step in (4, 8)}
    assert found == expected | {f"{f}/{name}" for f, names in folders.items() for name in names}


def test_no_result_is_a_pickle(demo):
    starts = (b"PK\x03\x04", *(bytes([0x80, version]) for version in range(2, 6)))
    for path in demo[0].rglob("*"):
        if path.is_file():
            assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle"), path
            assert not path.read_bytes().startswith(starts), path


def test_the_adapter_loads_with_peft_and_changes_the_logits(demo, tiny):
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        base = base_of(tiny)
        plain = base(input_ids=ids).logits
        model = PeftModel.from_pretrained(base, demo[0] / "final_lora").eval()
        assert not torch.equal(model(input_ids=ids).logits, plain)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain)


def test_an_adapted_layer_returns_wx_plus_alpha_over_r_bax(demo, tiny):
    path, final = "model.layers.1.self_attn.q_proj", demo[0] / "final_lora"
    base = base_of(tiny, torch.float64)
    weight, x = base.get_submodule(path).weight.detach().clone(), torch.randn(3, 64).double()
    tensors = load_file(final / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{path}.lora_{m}.weight"].double() for m in "AB")
    model = PeftModel.from_pretrained(base, final).double().eval()
    by_hand = x @ weight.T + (16 / 8) * (x @ a.T) @ b.T
    torch.testing.assert_close(model.get_submodule(f"base_model.model.{path}")(x), by_hand)
    assert not torch.allclose(by_hand, x @ weight.T)


def test_the_adapter_is_float32_and_as_large_as_planned(demo):
    tensors = load_file(demo[0] / "final_lora" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    planned = record_of(demo[0])["plan"]["trainable"]
    assert sum(tensor.numel() for tensor in tensors) == planned == 30_720


def test_the_adapters_config_says_what_the_constants_say(ready):
    trainer, job = ready(
        *("--lora_r", "12", "--lora_alpha", "20", "--lora_dropout", "0.1", "--dtype", "bfloat16"),
        *("--lora_target_modules", "q_proj", "up_proj"),
    )
    t.publish(trainer, job)
    for name in ("final_lora", "final_lora_vllm"):
        config = json.loads(read(job.output / name / "adapter_config.json"))
        found = (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"])
        assert found == (12, 20, 0.1, "none")
        assert sorted(config["target_modules"]) == ["q_proj", "up_proj"]
        assert (config["task_type"], config["base_model_name_or_path"]) == (
            "CAUSAL_LM", "tests/tiny-qwen3.5",
        )  # fmt: skip
    tensors = load_file(job.output / "final_lora" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.float32}  # though W is bfloat16


def test_the_vllm_form_has_the_names_that_peft_writes_for_the_wrapper(demo, tiny, tmp_path):
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tiny)
    lora = LoraConfig(target_modules=t.LORA_TARGET_MODULES)
    get_peft_model(wrapper, lora).save_pretrained(tmp_path)
    plain, vllm = [
        load_file(demo[0] / name / "adapter_model.safetensors")
        for name in ("final_lora", "final_lora_vllm")
    ]
    assert vllm.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(plain) == len(vllm)
    for name, tensor in plain.items():
        assert torch.equal(
            tensor, vllm[name.replace(".model.model.", ".model.model.language_model.")]
        )
    final, vllm = (demo[0] / name for name in ("final_lora", "final_lora_vllm"))
    assert contents(final / "adapter_config.json") == contents(vllm / "adapter_config.json")


def test_a_class_whose_names_vllm_applies_gets_no_second_form(ready, tiny):
    _, job = ready()
    wrapper = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tiny, dtype="float32")
    lora = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=t.LORA_TARGET_MODULES,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(wrapper, lora)
    fill(model)
    t.publish(types.SimpleNamespace(model=model), job)
    names = load_file(job.output / "final_lora" / "adapter_model.safetensors")
    assert all(".language_model." in name for name in names)
    assert not (job.output / "final_lora_vllm").exists()


def test_a_model_that_is_no_wrapper_gets_no_vllm_form_not_even_an_older_one(
    demo, lines, tiny, tmp_path, capsys
):
    base_of(tiny).save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "plain")
    output = shutil.copytree(demo[0], tmp_path / "output")
    flags = [*lines(tmp_path, train=2, evaluation=0), "--output_dir", str(output)]
    t.main([*flags, "--model_name", str(tmp_path / "plain")])
    assert (output / "final_lora").exists() and not (output / "final_lora_vllm").exists()
    (aside,) = output.glob("final_lora_vllm.2*")
    assert contents(aside) == contents(demo[0] / "final_lora_vllm")
    assert f"companion={output}/final_lora " in capsys.readouterr().out


def test_others_may_read_the_results(ready):
    before = os.umask(0o022)
    try:
        trainer, job = ready()
        t.publish(trainer, job)
    finally:
        os.umask(before)
    files = [path for name in RESULTS[:2] for path in (job.output / name).iterdir()]
    assert {f"{path.stat().st_mode & 0o777:o} {path}" for path in files} == {
        f"644 {path}" for path in files
    }
    assert len(files) == 8


# ==== Proof


@pytest.fixture
def adapted(tiny):
    """Return the demo model with a LoRA that changes it."""
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=t.LORA_TARGET_MODULES, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base_of(tiny), lora)
    fill(model)
    return model.eval()


ROW = {"input_ids": [5, 6, 7, 8]}
DIFFER = r"logits differ by (\S+) from the trained model's, by (\S+) from the base's"


def test_a_run_prints_its_proof(demo):
    (line,) = [line for line in demo[1].splitlines() if line.startswith("proof")]
    error, effect = map(float, re.search(DIFFER, line).groups())
    assert 0 <= error <= effect / 10 and effect > 0


def test_prove_returns_the_base_with_the_adapter_from_disk(adapted, tmp_path, tiny, capsys):
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([ROW["input_ids"]])
    with torch.no_grad():
        wanted, plain = adapted(input_ids=ids).logits, base_of(tiny)(input_ids=ids).logits
        model = t.prove(adapted, tmp_path, ROW)
        assert torch.equal(model(input_ids=ids).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain)
    printed = float(re.search(DIFFER, capsys.readouterr().out)[2])
    assert printed == pytest.approx((wanted - plain).abs().max().item(), rel=0.05)  # two digits


def zero(tensors, part):
    for name, tensor in tensors.items():
        if part in name:
            tensor.zero_()


TAMPERED = {
    "changed": (lambda x: x[f"{UP}.lora_A.weight"][0, 0].add_(1e-3), f": {UP}.lora_A.weight$"),
    "removed": (lambda x: x.pop(f"{UP}.lora_B.weight"), f": {UP}.lora_B.weight$"),
    "added": (lambda x: x.update(extra=torch.ones(2)), ": extra$"),
    "B of another": (lambda x: x[f"{UP}.lora_B.weight"].neg_(), f": {UP}.lora_B.weight$"),
    "nan": (lambda x: x[f"{UP}.lora_A.weight"][0].fill_(math.nan), f": {UP}.lora_A.weight$"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_file_that_is_not_as_trained_is_refused_by_the_tensors_name(adapted, tmp_path, name):
    edit, found = TAMPERED[name]
    adapted.save_pretrained(tmp_path)
    change_tensors(tmp_path, edit)
    with pytest.raises(SystemExit, match=f"^proof: in {tmp_path} not as trained, .*{found}"):
        t.prove(adapted, tmp_path, ROW)


def tiny_numbers(tensors):
    """So small that the logits, in float32, do not change."""
    for tensor in tensors.values():
        tensor.fill_(1e-30)


USELESS = {
    "all B zero": (lambda x: zero(x, "lora_B"), "all zero: .*lora_B.* and 7 more"),
    "one B zero": (lambda x: zero(x, "0.mlp.up_proj.lora_B"), f"all zero: {UP}.lora_B.weight$"),
    "infinite": (
        lambda x: x[f"{UP}.lora_B.weight"][0, 0].fill_(math.inf), "differ by nan .*does not work$"
    ),
    "NaN": (lambda x: x[f"{UP}.lora_A.weight"][0, 0].fill_(math.nan), f": {UP}.lora_A.weight$"),
    "A zero": (lambda x: zero(x, "lora_A"), "all zero: .*lora_A.* and 7 more"),
    "without effect": (lambda x: tiny_numbers(x), "by 0 from the base's; the adapter does not"),
}  # fmt: skip


@pytest.mark.parametrize("name", USELESS)
def test_an_adapter_that_does_nothing_or_is_not_finite_is_refused_though_saved_as_trained(
    adapted, tmp_path, name
):
    edit, found = USELESS[name]
    with torch.no_grad():
        edit(get_peft_model_state_dict(adapted))  # the parameters themselves
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    for key, tensor in get_peft_model_state_dict(adapted).items():
        assert torch.equal(tensor.nan_to_num(), saved[key].nan_to_num())
    with pytest.raises(SystemExit, match=f"^proof: .*{found}"):
        t.prove(adapted, tmp_path, ROW)


@pytest.mark.parametrize(("alpha", "good"), [(16, True), (16.16, True), (24, False), (-16, False)])
def test_equal_tensors_under_another_scale_are_refused_but_rounding_is_not(
    adapted, tmp_path, alpha, good
):
    """A hundredth of the effect may be a GPU's rounding, half of it is another adapter."""
    adapted.save_pretrained(tmp_path)
    change_json(tmp_path / "adapter_config.json", lora_alpha=alpha)
    with contextlib.nullcontext() if good else pytest.raises(SystemExit, match="does not work"):
        t.prove(adapted, tmp_path, ROW)


def test_a_failed_proof_touches_no_result_and_the_same_command_makes_up_for_it(
    demo, lines, tmp_path, monkeypatch, capsys, after_saving
):
    output = shutil.copytree(demo[0], tmp_path / "output")
    flags = [*lines(tmp_path), "--output_dir", str(output), "--seed", "7"]
    before = {
        name: (contents(output / name), (output / name).stat().st_mtime_ns) for name in RESULTS
    }
    spoil = [lambda tensors: tensors[f"{UP}.lora_A.weight"][0, 0].add_(1e-3)]
    after_saving(lambda folder: [change_tensors(folder, edit) for edit in spoil])
    with pytest.raises(SystemExit) as stop:
        t.main(flags)
    printed = capsys.readouterr()
    assert stop.value.code == 1 and printed.err.splitlines()[-1].startswith("proof: in ")
    assert "\ndone " not in printed.out and "\nproof " not in printed.out
    now = {name: (contents(output / name), (output / name).stat().st_mtime_ns) for name in RESULTS}
    assert now == before and record_of(output)["outcome"].startswith("failed: proof: in ")
    assert not [path for path in output.iterdir() if re.match(r".partial|final_.*\.2", path.name)]

    spoil.clear()
    for name in RESULTS:  # as if another run had ended within the same second
        stamp = time.strftime("%F-%H%M%S", time.localtime(before[name][1] / 1e9))
        Path(f"{output / name}.{stamp}").write_text(f"another {name}")
    t.main(flags)
    printed = capsys.readouterr().out
    assert "resume   from" in printed and record_of(output)["outcome"] == "finished"
    for name in RESULTS:
        older, aside = sorted(output.glob(f"{name}.2*"))
        assert older.read_text() == f"another {name}" and aside.name == f"{older.name}+"
        assert contents(aside) == before[name][0] != contents(output / name)
        assert f"{output / name} of an earlier run to {aside}\n" in printed
    words = [line.split()[0] for line in printed.splitlines() if line[:1].isalpha()]
    assert words.index("proof") < words.index("moved")  # what is there stays until then


# ==== A proved adapter stands, whatever happens after


def fails(error):
    def fail(*_, **__):
        raise error

    return fail


AFTERWARDS = {
    "samples, out of memory": (
        "samples.md", GenerationMixin, "generate", torch.OutOfMemoryError("CUDA out of memory")
    ),
    "samples, a bug": ("samples.md", GenerationMixin, "generate", IndexError("a bug upstream")),
    "picture": ("lora.png", matplotlib.figure.Figure, "savefig", OSError(28, "No space left")),
}  # fmt: skip


@pytest.mark.parametrize("what", AFTERWARDS)
def test_an_error_after_the_proof_is_a_warning_that_names_the_file(
    lines, tmp_path, monkeypatch, capsys, what
):
    file, owner, method, error = AFTERWARDS[what]
    monkeypatch.setattr(owner, method, fails(error))
    output = tmp_path / "output"
    t.main([*lines(tmp_path, train=4), "--output_dir", str(output)])  # exits with no status
    text, log = capsys.readouterr().out, read(output / "all_logs.log")
    (line,) = [line for line in text.splitlines() if line.startswith("warning")]
    assert line.startswith(f"warning  {file} is not written (") and "the adapter is whole" in line
    assert type(error).__name__ in line
    assert "Traceback" in log and "Traceback" not in text
    assert record_of(output)["outcome"] == "finished" and "\ndone " in text
    (other,) = {"lora.png", "samples.md"} - {file}
    assert (output / other).exists() and not (output / file).exists()
    base = base_of("tests/tiny-qwen3.5")
    assert PeftModel.from_pretrained(base, output / "final_lora").peft_config["default"].r == 8


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_interrupted_in_its_samples_leaves_the_adapter(
    demo, lines, tmp_path, monkeypatch, capsys, number, status
):
    def generate(*_, **__):
        os.kill(os.getpid(), number)
        time.sleep(5)
        raise AssertionError("the signal was not heard")

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as stop:
        t.main([*lines(tmp_path), "--output_dir", str(output)])
    assert stop.value.code == status and not (output / ".partial").exists()
    outcome = record_of(output)["outcome"]
    assert outcome == "finished"  # the rest can be done without
    assert f"{output}/final_lora is whole; the same command starts anew" in capsys.readouterr().err
    name = "adapter_model.safetensors"
    for folder in RESULTS[:2]:  # the same command as the demo's, so the same bytes
        assert contents(output / folder / name) == contents(demo[0] / folder / name)


# ==== samples.md


def read_samples(path):
    """Return [(where, {who: text})], and {who: [texts]} of all; a line out of place is an error."""
    found, head = [], True
    for line in path.read_bytes().decode().split("\n"):
        assert "\r" not in line
        if line.startswith("## "):
            head = found.append((line[3:], []))
        elif bold := re.fullmatch(r"\*\*(\w+)\*\*", line):
            found[-1][1].append((bold[1], []))
        elif line.startswith("> "):
            found[-1][1][-1][1].append(line[2:])
        else:
            assert head or not line, f"out of place: {line!r}"
    return [(where, [(who, "\n".join(text)) for who, text in turns]) for where, turns in found]


# A name that a shell and TeX would each read in another way.
ODD = r"it's $a\b$ & #1: 'model'"


@pytest.fixture(scope="module")
def lively(tmp_path_factory, tiny, lines):
    """Run with a model whose replies differ with the prompt, which the demo's hardly do.

    It has an odd name, r=12, 4 epochs of 13 steps, and would have replies drawn by chance, as chat
    models do. Return its name, output, text, figure and the prompts that were answered.
    """
    folder, figures, prompts = tmp_path_factory.mktemp("lively"), [], []
    model, output = shutil.copytree(tiny, folder / ODD), folder / "my output"
    weights = load_file(model / "model.safetensors")
    larger = {name for name in weights if "proj" in name and "language_model" in name}
    weights = {name: w * 3 if name in larger else w for name, w in weights.items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    by_chance = {"do_sample": True, "temperature": 5.0, "top_k": 50, "top_p": 0.99}
    change_json(model / "generation_config.json", **by_chance)
    save, generate = matplotlib.figure.Figure.savefig, GenerationMixin.generate

    def spy(self, input_ids, *args, **kwargs):
        prompts.extend(input_ids.tolist())
        return generate(self, input_ids, *args, **kwargs)

    flags = [*lines(folder), "--model_name", str(model), "--output_dir", str(output)]
    flags += ["--num_epochs", "4", "--batch_size", "1", "--gradient_accumulation_steps", "1"]
    flags += ["--lora_r", "12", "--num_samples", "2", "--max_new_tokens", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            matplotlib.figure.Figure,
            "savefig",
            lambda f, *a, **k: figures.append(f) or save(f, *a, **k),
        )
        patch.setattr(GenerationMixin, "generate", spy)
        t.main(flags)
    (figure,) = figures
    return types.SimpleNamespace(
        name=str(model), output=output, figure=figure, prompts=prompts, eval=folder / "eval.jsonl",
        text=read(output / "all_logs.log"), record=record_of(output),
    )  # fmt: skip


def greedy(model, ids, eos, limit):
    """Return the argmax reply to one prompt, without generate() and its cache."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + limit and eos not in ids[start:]:
            (best, second), (token, _) = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            assert best - second > 1e-5, "rounding could change this choice: take another model"
            ids.append(token.item())
    return ids[start:]


def test_samples_are_what_base_and_saved_adapter_answer_to_prompts_as_served(lively):
    samples = read_samples(lively.output / "samples.md")
    rows = [json.loads(line) for line in read(lively.eval).splitlines()]
    assert [where for where, _ in samples] == [f"{lively.eval}:{n}" for n in (1, 3)]
    tokenizer = AutoTokenizer.from_pretrained(lively.name)
    how = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
    texts = [tokenizer.apply_chat_template(rows[n]["prompt"], **how) for n in (0, 2)]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert all(text.endswith("assistant\n<think>\n\n</think>\n\n") for text in texts)
    assert lively.prompts == [prompts[0], prompts[0], prompts[1], prompts[1]]
    model, eos = base_of(lively.name), tokenizer.eos_token_id
    answers = {"base": [greedy(model, ids, eos, 10) for ids in prompts]}
    model = PeftModel.from_pretrained(model, lively.output / "final_lora").eval()
    answers["adapter"] = [greedy(model, ids, eos, 10) for ids in prompts]
    assert answers["base"] != answers["adapter"]
    for number, (_, turns) in enumerate(samples):
        row = rows[2 * number]
        wanted = [(message["role"], message["content"]) for message in row["prompt"]]
        for who, replies in answers.items():
            text = tokenizer.decode(replies[number], skip_special_tokens=True)
            text += " [cut here]" * (eos not in replies[number])
            wanted.append((who, re.sub("\r\n?", "\n", text.strip())))
        assert turns == [*wanted, ("written", row["completion"][0]["content"])]
    assert "\nsamples  2 prompts with and without the adapter: " in lively.text


MARKDOWN = ["# no heading", "", "## no.jsonl:7", "**base**", "```", "> quote", "1. <b>", "---"]
REPLIES = [  # to the prompts of four rows, with what must be read
    ("short<|im_end|>", "short"),
    ("one that goes on and", "one that goes on and [cut here]"),
    ("\r".join(MARKDOWN) + "<|im_end|>", "\n".join(MARKDOWN)),
    ("\r\n".join(MARKDOWN) + "<|im_end|>", "\n".join(MARKDOWN)),
]


def test_replies_are_quoted_line_by_line_and_those_that_were_cut_are_marked(
    lines, tmp_path, tiny, monkeypatch, capsys
):
    """More samples are asked for than there are prompts; messages hold what replies may."""
    tokenizer, asked = AutoTokenizer.from_pretrained(tiny), []

    def generate(self, input_ids, generation_config, **how):
        how["config"] = generation_config
        layer = next(one for one in self.modules() if isinstance(one, LoraLayer))
        text = "base " * layer.disable_adapters + REPLIES[len(asked) // 2][0]
        reply = torch.tensor([tokenizer(text)["input_ids"]])
        assert reply[0].tolist().count(tokenizer.eos_token_id) == text.count("<|im_end|>")
        asked.append((layer.disable_adapters, how))
        return torch.cat([input_ids, reply], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    flags, text = lines(tmp_path, train=2), "\r\n".join(MARKDOWN)
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    row = json.dumps({"messages": said}) + "\n"
    (tmp_path / "eval.jsonl").write_text(row * len(REPLIES), encoding="utf-8")
    more = ["--num_samples", "9", "--max_new_tokens", "77"]
    t.main([*flags, *more, "--num_epochs", "1", "--output_dir", str(tmp_path / "output")])
    samples = read_samples(tmp_path / "output" / "samples.md")
    assert [where for where, _ in samples] == [f"{tmp_path}/eval.jsonl:{n}" for n in range(1, 5)]
    for (_, turns), (_, expected) in zip(samples, REPLIES, strict=True):
        assert [who for who, _ in turns] == ["user", "base", "adapter", "written"]
        found = dict(turns)
        assert found["user"] == found["written"] == "\n".join(MARKDOWN)
        assert (found["base"], found["adapter"]) == (f"base {expected}", expected)
    assert [is_base for is_base, _ in asked] == [True, False] * 4
    hows = [how.pop("config") for _, how in asked]
    assert {(how.do_sample, how.max_new_tokens) for how in hows} == {(False, 77)}
    assert {how.eos_token_id for how in hows} == {tokenizer.eos_token_id}
    assert {how.pad_token_id for how in hows} == {tokenizer.pad_token_id}
    assert all(how.keys() == {"attention_mask", "streamer"} for _, how in asked)
    assert all(how["attention_mask"].all() for _, how in asked)
    assert "\nsamples  4 prompts with and without the adapter: " in capsys.readouterr().out


# ==== lora.png


def test_the_picture_shows_the_logged_losses_and_what_was_learnt(lively):
    """The sizes that it shows are compared in test_learnt.py."""
    above, sizes, used = lively.figure.axes[:3]
    drawn = {line.get_label(): [*zip(*line.get_data(), strict=True)] for line in above.lines}
    history = lively.record["loss_history"]
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    assert drawn.pop("loss") == losses and len(losses) == 52
    evals = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    assert drawn.pop("eval_loss") == evals and [step for step, _ in evals] == [0, 13, 26, 39, 52]
    assert not drawn and above.get_ylabel() == "loss, nats per token"
    learnt = lively.record["learnt"]
    assert [label.get_text() for label in sizes.get_yticklabels()] == [*learnt]
    assert [label.get_text() for label in sizes.get_xticklabels()] == ["0\nD", "1"]
    assert sizes.get_xlabel() == "layer (D: Gated DeltaNet; hatched: no such module)"
    assert sizes.patch.get_hatch()
    # Of attention's targets the DeltaNet layer has none: blank.
    image = sizes.images[0].get_array()
    there = {(n, row["layer"]) for n, rows in enumerate(learnt.values()) for row in rows}
    shape = {(n, layer) for n in range(image.shape[0]) for layer in range(image.shape[1])}
    assert {place for place in shape if image[place] is not numpy.ma.masked} == there < shape
    assert sizes.images[0].norm.vmin == 0  # or small updates would look like none
    means = [statistics.fmean(row["directions"] for row in rows) for rows in learnt.values()]
    assert [bar.get_width() for bar in used.patches] == pytest.approx(means)
    assert used.get_xlim() == (0, 12) and sizes.get_ylim() == used.get_ylim()
    assert "r=12 alpha=" in above.get_title()


def test_the_picture_is_a_png_with_something_on_it(demo, lively):
    for output in (demo[0], lively.output):
        assert (output / "lora.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        image = matplotlib.image.imread(output / "lora.png")
        assert image.shape[:2] == (960, 1320)
        assert len({tuple(one) for one in image[::3, ::3, :3].reshape(-1, 3).tolist()}) > 20


def test_the_demo_says_that_its_weights_are_random(demo, capsys):
    assert "\ndemo     random weights: " in demo[1]
    with pytest.raises(SystemExit):
        t.main(["--dry_run", "--train_file", "absent.jsonl"])
    assert "random" not in capsys.readouterr().out


# ==== The command


def served(text):
    """Return (model, options) of the only vllm command in text, as a shell splits it."""
    command = re.search(r"^ *vllm serve (?:.*\\\n)*.*", text.replace("next     ", ""), re.MULTILINE)
    words, options = shlex.split(command[0].replace("\\\n", "")), {}
    assert text.count("vllm serve ") == 1 and words[:2] == ["vllm", "serve"]
    rest = iter(words[3:])
    for word in rest:
        options[word] = True if word == "--enable-lora" else next(rest)
    return words[2], options


def test_the_run_ends_with_the_command_that_serves_its_adapter(demo):
    output, text = demo
    model, options = served(text)
    assert model == "tests/tiny-qwen3.5" and text.index("\ndone ") < text.index("\nnext ")
    assert json.loads(options.pop("--default-chat-template-kwargs")) == {"enable_thinking": False}
    assert options == {
        "--revision": "main", "--enable-lora": True, "--max-lora-rank": "8",
        "--lora-modules": f"companion={output}/final_lora_vllm",
    }  # fmt: skip


def test_odd_names_survive_the_shell_and_the_rank_is_the_saved_ones(lively):
    model, options = served(lively.text)
    assert model == lively.name and options["--max-lora-rank"] == "16"
    assert options["--lora-modules"] == f"companion={lively.output}/final_lora_vllm"
    config = json.loads(read(lively.output / "final_lora_vllm" / "adapter_config.json"))
    assert (config["r"], config["base_model_name_or_path"]) == (12, lively.name)


# ==== The summary


def end_of(text):
    """Return the lines of the summary as {word: rest}."""
    lines = text[text.rindex("\ndone ") + 1 :].split("\nnext ")[0].split("\n")
    return {line[9:20].strip(): line[20:] for line in lines}


def test_the_summary_says_where_things_are_and_what_the_run_did(demo):
    output, text = demo
    record, end = record_of(output), end_of(text)
    where = f"{output}/final_lora, of epoch 2 of 2"
    assert end["adapter"] == where
    printed = [line.split()[-1] for line in text.splitlines() if line.startswith("eval ")]
    losses = [e["eval_loss"] for e in record["loss_history"] if "eval_loss" in e]
    assert [f"{loss:.4f}" for loss in losses] == printed and len(losses) == 3
    assert end["eval loss"] == " -> ".join(printed)
    rate = int(end["speed"].split()[0].replace(",", ""))
    assert rate == round(record["tokens"] / record["train_seconds"])
    tokens = [facts["tokens"] for facts in record["data"].values()]
    assert record["tokens"] == 2 * tokens[0]  # of two epochs, padding not counted
    total, steps = map(
        float, re.match(r"(\S+) min since this start, (\S+) in steps$", end["time"]).groups()
    )
    assert total >= steps


@pytest.fixture
def with_losses(lines, tmp_path, monkeypatch, capsys):
    """Return a function that gives (output, summary) of a run with these eval losses."""

    def run(*losses, folder="output", more=()):
        def prediction_step(trainer, *_, **__):  # two lines are one step an epoch
            return torch.tensor(losses[trainer.state.global_step]), None, None

        monkeypatch.setattr(trl.SFTTrainer, "prediction_step", prediction_step)
        flags = [*lines(tmp_path, train=2), "--num_epochs", str(max(1, len(losses) - 1))]
        flags += ["--output_dir", str(tmp_path / folder), "--num_samples", "0", *more]
        t.main(flags)
        return tmp_path / folder, end_of(capsys.readouterr().out)

    return run


def test_where_the_eval_loss_rose_each_epoch_is_shown_and_kept(with_losses, tiny):
    output, end = with_losses(3.0, 2.0, 2.5, 2.75)
    assert end["eval loss"] == "3.0000 -> 2.0000 -> 2.5000 -> 2.7500"
    best = output / "checkpoints" / "checkpoint-1"
    assert PeftModel.from_pretrained(base_of(tiny), best).peft_config["default"].r == 8


def test_without_eval_nothing_is_said_of_it_and_an_older_samples_file_moves_away(
    with_losses, tmp_path
):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "samples.md").write_text("older")
    output, end = with_losses(more=["--eval_file", ""])
    assert end["eval loss"] == "not evaluated" and "overfit" not in end
    assert not (output / "samples.md").exists()
    (aside,) = output.glob("samples.md.2*")
    assert aside.read_text() == "older"
    record = record_of(output)
    assert not [entry for entry in record["loss_history"] if "eval_loss" in entry]
    assert [*record["data"]] == [str(tmp_path / "train.jsonl")]


def test_after_going_on_losses_are_those_of_all_and_time_and_speed_of_the_rest(
    demo, lines, tmp_path, monkeypatch, capsys
):
    output, step = tmp_path / "output", transformers.Trainer.training_step
    flags, calls = [*lines(tmp_path), "--output_dir", str(output), "--num_samples", "2"], []

    def training_step(*args, **kwargs):
        if len(calls) == 8:  # in the fifth step: the first epoch has 7 batches
            os.kill(os.getpid(), signal.SIGTERM)
        began = time.monotonic()
        loss = step(*args, **kwargs)
        calls.append(time.monotonic() - began)
        return loss

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    with pytest.raises(SystemExit):
        t.main(flags)
    first, done = record_of(output), len(calls)
    capsys.readouterr()
    t.main(flags)
    text = capsys.readouterr().out
    end, record, whole = end_of(text), record_of(output), record_of(demo[0])
    assert "overfit" not in end and end["eval loss"] == end_of(demo[1])["eval loss"]
    assert end["time"].endswith(" in steps")
    assert record["train_seconds"] >= sum(calls[done:]) and (done, len(calls)) == (9, 14)
    assert first["tokens"] > record["tokens"] > 0
    assert first["tokens"] + record["tokens"] == whole["tokens"]
    rate = int(end["speed"].split()[0].replace(",", ""))
    assert rate == round(record["tokens"] / record["train_seconds"])
    steps = [
        [(e["step"], e["loss"]) for e in r["loss_history"] if "loss" in e] for r in (record, whole)
    ]
    assert steps[0] == steps[1] and [step for step, _ in steps[0]] == [*range(1, 9)]
    name = "final_lora/adapter_model.safetensors"
    assert contents(output / name) == contents(demo[0] / name)


# ==== run.json


def test_run_json_holds_what_another_needs_to_do_it_again(demo):
    output, record = demo[0], record_of(demo[0])
    assert record["outcome"] == "finished" and record["resumed_from"] is None
    measured = {"train_seconds", "tokens", "learnt", "peak_memory_gib", "loss_history", "products"}
    given = {"outcome", "started", "versions", "constants", "device", "data", "plan"}
    assert record.keys() == {*given, *measured, "resumed_from", "published"}
    assert record["published"] == "of epoch 2 of 2"
    constants = record["constants"]
    assert constants.keys() == t.RULES.keys() and constants["SAVE_STEPS"] == 3
    assert constants["OUTPUT_DIR"] == str(output) and constants["LEARNING_RATE"] == 1e-2
    packages = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"]
    for name in packages:
        assert record["versions"][name] == importlib.metadata.version(name)
    assert record["device"] == "CPU" and record["products"] == {"used": "dtype"}
    assert record["plan"]["steps"] == 8 and record["plan"]["trainable"] == 30_720
    assert [e["step"] for e in record["loss_history"] if "loss" in e] == [*range(1, 9)]
    assert [e["step"] for e in record["loss_history"] if "eval_loss" in e] == [0, 4, 8]
    for path, facts in record["data"].items():
        assert facts["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ==== What a whole run touches, as a user with secrets

# The script as its own process runs it, with each path opened for writing, each path that is made,
# moved or removed, and each connection written to a list.
SPY = """
import os, runpy, sys
spied = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
MOVES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate")
def spy(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        by_flags = args[1] is None and isinstance(args[2], int) and args[2] & WRITES
        writes = by_flags or set("wax+") & set(args[1] or "")
    else:
        writes = event in MOVES
    if writes:
        os.write(spied, b"write " + os.path.abspath(os.fsencode(args[0])) + b"\\n")
    elif event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os.write(spied, f"network {args}\\n".encode())
sys.addaudithook(spy)
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
SECRET = "s3cr3t-0f-the-user"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "MY_PASSWORD")


def test_a_run_writes_only_its_output_and_caches_connects_to_nothing_and_tells_no_secret(
    lines, tmp_path
):
    repo, root = tmp_path / "repo", Path(t.__file__).parent
    shutil.copytree(root / "tests" / "tiny-qwen3.5", repo / "tests" / "tiny-qwen3.5")
    shutil.copy(t.__file__, repo)
    for name in ("home", "cache", "tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / "cache" / "token").write_text(SECRET)
    flags = [*lines(tmp_path, train=4), "--num_epochs", "1"]
    before = contents(tmp_path)
    # Online, and with a notebook's backend of matplotlib, which is not installed.
    unset = (
        "HF_HUB_OFFLINE",
        "PYTHONPATH",
        "XDG_CACHE_HOME",
        "MPLCONFIGDIR",
        "TORCHINDUCTOR_CACHE_DIR",
    )
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "cache")}
    environment |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
    environment |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"} | dict.fromkeys(
        SECRETS, SECRET
    )
    done = subprocess.run(
        [sys.executable, "-c", SPY, str(tmp_path / "spied"), "train_lora_single.py", *flags],
        cwd=repo, env=environment, capture_output=True, text=True, timeout=300, umask=0o022,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output = repo / "output" / "demo"
    assert "\nwarning" not in done.stdout and (output / "lora.png").exists()

    after, spied = contents(tmp_path), read(tmp_path / "spied").splitlines()
    assert {name: after.get(name) for name in before} == before
    caches = [tmp_path / name for name in ("home", "cache", "tmp", "spied")]
    new = [tmp_path / name for name in after.keys() - before.keys()]
    assert [path for path in new if not below(path, [output, *caches])] == []
    written = {Path(line.partition(" ")[2]) for line in spied if line.startswith("write ")}
    assert output / "all_logs.log" in written
    allowed = [repo / "output", *caches, Path("/dev")]
    assert [path for path in written if not below(path, allowed)] == []
    assert [line for line in spied if line.startswith("network ")] == []

    files = [path for path in output.rglob("*") if path.is_file()]
    assert len(files) > 10 and any(b"tests/tiny-qwen3.5" in path.read_bytes() for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert SECRET not in done.stdout + done.stderr
    apart = output / "checkpoints"  # of which a server needs nothing
    modes = {path: path.stat().st_mode & 0o777 for path in files if not below(path, [apart])}
    assert set(modes.values()) == {0o644}, modes


def below(path, folders):
    """Return whether path is one of the folders, or in one."""
    return any(path.is_relative_to(one) for one in folders)
