"""What a run leaves: the proof, the card, samples.md, loss.png, run.json, and earlier results under a time stamp."""

import ast
import contextlib
import datetime
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import matplotlib.figure
import matplotlib.image
import pytest
import torch
import trl
import yaml
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_lora_single as t

ROOT = Path(__file__).parent.parent
PACKAGES = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "matplotlib"]
SECRETS = {name: f"hf_secret_{name}_0123456789" for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")}
KEPT = ("final_lora", "final_lora_vllm", "samples.md", "loss.png", "run.json", "checkpoints")
UP = "base_model.model.model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """Return a demo model whose greedy replies differ with the prompt; the shipped one only repeats a newline."""
    model = shutil.copytree(ROOT / "tests" / "tiny-qwen3.5", tmp_path_factory.mktemp("model") / "lively")
    weights = load_file(model / "model.safetensors")
    weights = {n: w * 3 if "proj" in n and "language_model" in n else w for n, w in weights.items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return str(model)


@pytest.fixture(scope="module")
def small(tmp_path_factory, lively):
    """Flags for one epoch on the first 13 training lines, of which one is too long, and the first 4 eval lines."""
    folder = tmp_path_factory.mktemp("data")
    flags = ["--demo", "--model_name", lively, "--max_seq_len", "352", "--num_samples", "2", "--max_new_tokens", "12"]
    for name, lines in (("train", 13), ("eval", 4)):
        text = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(text[:lines]), encoding="utf-8")
        flags += [f"--{name}_file", str(folder / f"{name}.jsonl")]
    return flags


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Do a run of three epochs of three steps; return its output folder, flags, args, stdout, figure and more."""
    output, text, figures = tmp_path_factory.mktemp("run") / "output", io.StringIO(), []
    flags = [*small, "--num_epochs", "3", "--save_steps", "4", "--logging_steps", "3", "--output_dir", str(output)]
    save = matplotlib.figure.Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        for name, secret in SECRETS.items():
            patch.setenv(name, secret)
        patch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
        start = time.time()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(io.StringIO()):
            t.main(flags)
    end, (figure,) = time.time(), figures
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    return SimpleNamespace(
        output=output, flags=flags, args=t.parse_args(flags), text=text.getvalue(), figure=figure,
        start=start, end=end, head=head.stdout.strip(), record=strict(output),
    )  # fmt: skip


@pytest.fixture
def adapted(tiny):
    """Return the demo model with a LoRA that changes it."""
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=t.LORA_TARGET_MODULES, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny, dtype="float32"), lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def strict(output):
    """Return what output/run.json holds; NaN, which is not JSON, is an error."""

    def refuse(constant):
        raise AssertionError(f"run.json holds {constant}")

    return json.loads(Path(output, "run.json").read_text(encoding="utf-8"), parse_constant=refuse)


def contents(path):
    """Return the bytes of a file, or of each file below a folder."""
    path = Path(path)
    if path.is_file():
        return path.read_bytes()
    return {str(one.relative_to(path)): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def with_flags(finished, output, *flags):
    """Return the flags of the finished run for another output folder, with one epoch and flags on top."""
    return [*finished.flags, "--num_epochs", "1", "--output_dir", str(output), *map(str, flags)]


def change(folder, edit):
    """Edit the saved tensors in folder with edit(tensors)."""
    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def change_model(model, edit):
    """Edit the adapter's tensors in model with edit(tensors)."""
    tensors = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    edit(tensors)
    set_peft_model_state_dict(model, tensors)


# ---- proof ----------------------------------------------------------------------------------------------------------


def test_a_run_prints_a_proof_without_any_difference(finished):
    (line,) = [line for line in finished.text.splitlines() if line.startswith("proof")]
    error, effect = re.search(
        r"logits differ by (\S+) from the trained model's, by (\S+) from the base's", line
    ).groups()
    assert float(error) == 0 and float(effect) > 0


def test_prove_returns_the_base_with_the_adapter_from_disk(adapted, tmp_path, tiny, capsys):
    adapted.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = adapted(input_ids=ids).logits
        model = t.prove(adapted, tmp_path, {"input_ids": [5, 6, 7, 8]})
        plain = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, wanted)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain)
    difference = re.search(r"by (\S+) from the base's", capsys.readouterr().out)[1]
    assert float(difference) == pytest.approx((wanted - plain).abs().max().item(), rel=0.05)


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda x: x[f"{UP}.lora_A.weight"][0, 0].add_(1e-3), f"{UP}.lora_A.weight"),
        (lambda x: x.pop(f"{UP}.lora_B.weight"), f"{UP}.lora_B.weight"),
        (lambda x: x.update(extra=torch.ones(2)), "extra"),
        (lambda x: x[f"{UP}.lora_A.weight"][0, 0].fill_(math.nan), f"{UP}.lora_A.weight"),
    ],
    ids=["changed", "removed", "added", "nan"],
)
def test_a_saved_file_that_is_not_the_trained_one_is_refused(adapted, tmp_path, edit, found):
    adapted.save_pretrained(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(SystemExit, match=f"^proof: .* not as trained, .*: {re.escape(found)}(, {re.escape(found)})?$"):
        t.prove(adapted, tmp_path, {"input_ids": [5, 6, 7, 8]})


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        (lambda x: [tensor.zero_() for name, tensor in x.items() if "lora_B" in name], r"lora_B.* and 7 more"),
        (lambda x: x[f"{UP}.lora_B.weight"].zero_(), f": {re.escape(UP)}.lora_B.weight$"),
        (lambda x: x[f"{UP}.lora_B.weight"][0, 0].fill_(math.inf), f": {re.escape(UP)}.lora_B.weight$"),
    ],
    ids=["all B zero", "one B zero", "infinite"],
)
def test_an_adapter_that_is_zero_or_infinite_is_refused_though_saved_as_trained(adapted, tmp_path, edit, found):
    change_model(adapted, edit)
    adapted.save_pretrained(tmp_path)
    kept, saved = get_peft_model_state_dict(adapted), load_file(tmp_path / "adapter_model.safetensors")
    assert kept.keys() == saved.keys() and all(torch.equal(kept[name], saved[name]) for name in kept)
    with pytest.raises(SystemExit, match=f"^proof: .*{found}"):
        t.prove(adapted, tmp_path, {"input_ids": [5, 6, 7, 8]})


def test_equal_tensors_under_another_alpha_are_refused(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 16
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 32}))
    with pytest.raises(SystemExit, match=r"its logits differ by .* the adapter does not work"):
        t.prove(adapted, tmp_path, {"input_ids": [5, 6, 7, 8]})


def test_an_adapter_without_effect_is_refused(adapted, tmp_path):
    change_model(adapted, lambda x: [tensor.zero_() for name, tensor in x.items() if "lora_A" in name])
    adapted.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=r"its logits differ by 0 from the trained model's, by 0 from the base's"):
        t.prove(adapted, tmp_path, {"input_ids": [5, 6, 7, 8]})


def tampered(patch):
    """Have save_adapter change a number of what it has saved; return what the run must say."""
    save = t.save_adapter

    def tamper(model, tokenizer, config, folder, args):
        save(model, tokenizer, config, folder, args)
        change(folder / "final_lora", lambda x: x[f"{UP}.lora_A.weight"][0, 0].add_(1e-3))

    patch.setattr(t, "save_adapter", tamper)
    return rf"proof: .* not as trained, not finite or all zero: {UP}.lora_A"


def full(patch):
    """Have the disk be full when the losses are drawn; return what the run must say."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    patch.setattr(t, "draw_losses", fail)
    return r"OUTPUT_DIR .* cannot be written .*No space left on device"


@pytest.mark.parametrize("fault", [tampered, full])
def test_results_that_fail_leave_older_ones_and_the_same_command_makes_up_for_it(
    finished, tmp_path, monkeypatch, capsys, fault
):
    output = shutil.copytree(finished.output, tmp_path / "output")
    names, flags = KEPT[:4], with_flags(finished, output, "--seed", 7)
    before = {name: (contents(output / name), (output / name).stat().st_mtime_ns) for name in names}
    with monkeypatch.context() as patch:
        message = fault(patch)
        with pytest.raises(SystemExit) as stop:
            t.main(flags)
    printed = capsys.readouterr()
    assert stop.value.code == 1 and re.search(rf"^{message}", printed.err, re.MULTILINE)
    assert "Traceback" not in printed.err + (output / "all_logs.log").read_text(encoding="utf-8")
    assert "\ndone " not in printed.out and "\nnext " not in printed.out
    assert {n: (contents(output / n), (output / n).stat().st_mtime_ns) for n in names} == before
    assert not [one for name in names for one in output.glob(f"{name}.2*")]
    assert re.match(f"failed: {message}", strict(output)["outcome"])
    t.main(flags)
    assert "resume   from" in capsys.readouterr().out and strict(output)["outcome"] == "finished"
    for name in names:
        (aside,) = output.glob(f"{name}.2*")
        assert contents(aside) == before[name][0] != contents(output / name)
    assert not (output / "partial").exists()


def test_an_adapter_that_failed_its_proof_is_not_kept(finished, tmp_path, monkeypatch):
    tampered(monkeypatch)
    with pytest.raises(SystemExit):
        t.main(with_flags(finished, tmp_path))
    assert strict(tmp_path)["outcome"].startswith("failed: proof: ")
    assert {path.name for path in tmp_path.iterdir()} == {"all_logs.log", "run.json", "checkpoints"}


# ---- the two forms and the card -------------------------------------------------------------------------------------


def test_the_form_for_vllm_has_the_same_config(finished):
    final, vllm = (finished.output / name for name in ("final_lora", "final_lora_vllm"))
    assert {path.name for path in vllm.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert contents(final / "adapter_config.json") == contents(vllm / "adapter_config.json")


def card_of(folder, r, *flags, system=None, vllm=False):
    """Return (card, command) that write_card makes for a hand-made adapter of rank r."""
    final, args = folder / "final_lora", t.parse_args([*flags])
    final.mkdir(parents=True)
    (final / "README.md").write_text(
        "---\nbase_model: a/b\nlibrary_name: peft\ntags:\n- lora\n---\n\n# Model\n\n[More Information Needed]\n\n---\n"
    )
    (final / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": 6, "target_modules": ["v_x", "q_x"]}))
    if vllm:
        (folder / "final_lora_vllm").mkdir()
    command = t.write_card(folder, args, system)
    return (final / "README.md").read_text(encoding="utf-8"), command


def blocks(card):
    """Return the code blocks of a card."""
    return re.findall(r"^```\w*\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)


def served(command):
    """Return the words of the vllm command as a shell splits them, options as a dict."""
    words = shlex.split(command.replace("\\\n", ""))
    position = 3
    options = {}
    assert words[:2] == ["vllm", "serve"]
    while position < len(words):
        flag = words[position] == "--enable-lora"
        options[words[position]] = True if flag else words[position + 1]
        position += 1 if flag else 2
    return words[2], options


def asked(card):
    """Return the JSON that the card's curl line sends."""
    (line,) = [line for line in card.split("\n") if line.startswith("curl ")]
    words = shlex.split(line)
    assert words[-2] == "-d" and "Content-Type: application/json" in words
    return json.loads(words[-1])


def test_the_card_keeps_pefts_head_and_none_of_its_gaps(finished):
    card = (finished.output / "final_lora" / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == finished.args.model_name and head["library_name"] == "peft"
    assert "lora" in head["tags"]
    assert "[More Information Needed]" not in card
    assert card.startswith("---\n") and "\n# LoRA adapter for " in card


def test_a_hand_made_card_keeps_its_head_and_drops_the_rest(tmp_path):
    card, _ = card_of(tmp_path, 8)
    assert yaml.safe_load(card.split("---\n")[1]) == {"base_model": "a/b", "library_name": "peft", "tags": ["lora"]}
    assert "More Information" not in card and card.count("---\n") == 2


@pytest.mark.parametrize(("r", "rank"), [(1, "1"), (4, "8"), (8, "8"), (12, "16"), (16, "16"), (33, "64")])
def test_the_card_gives_the_smallest_max_lora_rank_that_vllm_takes(tmp_path, r, rank):
    card, command = card_of(tmp_path, r)
    assert served(command)[1]["--max-lora-rank"] == rank
    assert f"r={r}, alpha=6, on q_x, v_x.\n" in card and f"takes for r={r}." in card


def test_the_card_follows_the_saved_config_and_not_the_constants(tmp_path):
    card, command = card_of(tmp_path, 12, "--lora_r", "300", "--lora_alpha", "77")
    assert served(command)[1]["--max-lora-rank"] == "16"
    assert "r=12, alpha=6," in card and "300" not in card and "320" not in card and "77" not in card


@pytest.mark.parametrize("vllm", [True, False])
def test_the_card_serves_the_form_for_vllm_exactly_where_there_is_one(tmp_path, vllm):
    _, command = card_of(tmp_path, 8, "--output_dir", "some/where", vllm=vllm)
    name = "final_lora_vllm" if vllm else "final_lora"
    assert served(command)[1]["--lora-modules"] == f"companion=some/where/{name}"


def test_the_command_serves_the_trained_model_without_thinking(tmp_path):
    _, command = card_of(tmp_path, 8, "--model_name", "org/model", "--model_revision", "v1.2")
    model, options = served(command)
    assert model == "org/model" and options["--revision"] == "v1.2" and options["--enable-lora"]
    assert json.loads(options["--default-chat-template-kwargs"]) == {"enable_thinking": False}


@pytest.mark.parametrize("flags", [("--output_dir", "my output"), ("--model_name", "my models/it's 4B")])
def test_the_command_can_be_pasted_where_a_name_holds_a_space(tmp_path, flags):
    _, command = card_of(tmp_path, 8, *flags)
    args = t.parse_args([*flags])
    model, options = served(command)
    assert (model, options["--lora-modules"]) == (args.model_name, f"companion={args.output_dir}/final_lora")


@pytest.mark.parametrize(
    "system",
    [
        "You are Nell.",
        """It's "Nell's" $HOME `id` \\ "quoted\"""",
        "Grüße, schöne Füße: 你好 🙂",
        "line one\nline two\n\n```\n---\nend\ttab\r\n",
        "'",
    ],
)
def test_request_and_python_send_the_training_system_message(tmp_path, system):
    card, _ = card_of(tmp_path, 8, system=system)
    request = asked(card)
    assert request["model"] == "companion"
    assert request["messages"] == [{"role": "system", "content": system}, {"role": "user", "content": "Good morning."}]
    tree = ast.parse(blocks(card)[2])
    (assigned,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "messages"]
    assert ast.literal_eval(assigned) == request["messages"]


def test_without_a_system_message_the_card_has_none(tmp_path):
    card, _ = card_of(tmp_path, 8, system=None)
    assert asked(card)["messages"] == [{"role": "user", "content": "Good morning."}]
    assert "'role': 'system'" not in card


def test_the_card_of_a_run_names_what_is_there_and_the_runs_system_message(finished):
    card = (finished.output / "final_lora" / "README.md").read_text(encoding="utf-8")
    model, options = served(blocks(card)[0])
    assert model == finished.args.model_name
    assert options["--lora-modules"] == f"companion={finished.output}/final_lora_vllm"
    first = json.loads(Path(finished.args.eval_file).read_text(encoding="utf-8").splitlines()[0])
    assert first["prompt"][0]["role"] == "system" and asked(card)["messages"][0] == first["prompt"][0]


def test_the_card_has_the_system_message_of_the_training_file(finished, tmp_path):
    data, seen = Path(finished.args.eval_file).read_text(encoding="utf-8"), "You are Nell,"
    assert data.count(seen) == 4
    (tmp_path / "eval.jsonl").write_text(data.replace(seen, "You are Bob,"), encoding="utf-8")
    t.main(with_flags(finished, tmp_path, "--eval_file", tmp_path / "eval.jsonl", "--num_samples", 0))
    card = (tmp_path / "final_lora" / "README.md").read_text(encoding="utf-8")
    assert asked(card)["messages"][0]["content"].startswith(seen)


def test_the_next_lines_have_the_command_of_the_card(finished):
    card = (finished.output / "final_lora" / "README.md").read_text(encoding="utf-8")
    section = finished.text[finished.text.index("\nnext ") + 1 :].rstrip("\n").split("\n")
    lines = [line[9:] for line in section]
    assert "\n".join(lines[:-1]) + "\n" == blocks(card)[0]
    assert lines[-1].startswith(f"{finished.output}/final_lora/README.md")


def test_the_python_lines_of_the_card_run(finished):
    card, printed = (finished.output / "final_lora" / "README.md").read_text(encoding="utf-8"), []
    names = {"print": lambda *args: printed.extend(args)}
    exec(blocks(card)[2], names)
    (reply,) = printed
    assert isinstance(reply, str) and reply.strip()
    assert isinstance(names["model"], PeftModel) and not names["model"].training
    prompt = names["tokenizer"].decode(names["inputs"]["input_ids"][0])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and "You are Nell" in prompt


# ---- samples.md -----------------------------------------------------------------------------------------------------


def read_samples(path):
    """Return the conversations in samples.md as (where, [(who, text)]); a line out of place is an error."""
    found, head = [], True
    for line in path.read_bytes().decode().split("\n"):
        if line.startswith("## "):
            head = found.append((line[3:], []))
        elif bold := re.fullmatch(r"\*\*(\w+)\*\*", line):
            found[-1][1].append((bold[1], []))
        elif line.startswith("> "):
            found[-1][1][-1][1].append(line[2:])
        else:
            assert head or not line, f"out of place: {line!r}"
    return [(where, [(who, "\n".join(lines)) for who, lines in turns]) for where, turns in found]


def greedy(model, ids, eos, limit=12):
    """Return the argmax reply to one prompt, without batch, padding, cache or generate()."""
    ids, start = list(ids), len(ids)
    with torch.no_grad():
        while len(ids) < start + limit and eos not in ids[start:]:
            (best, second), (token, _) = model(input_ids=torch.tensor([ids])).logits[0, -1].topk(2)
            assert best - second > 1e-5, "a choice that rounding could change; take another model"
            ids.append(token.item())
    return ids[start:]


def test_samples_are_what_base_and_adapter_from_disk_answer(finished):
    samples = read_samples(finished.output / "samples.md")
    rows = [json.loads(line) for line in Path(finished.args.eval_file).read_text(encoding="utf-8").splitlines()]
    assert [where for where, _ in samples] == [f"{finished.args.eval_file}:{n}" for n in (1, 3)]
    tokenizer = AutoTokenizer.from_pretrained(finished.args.model_name)
    base = AutoModelForCausalLM.from_pretrained(finished.args.model_name, dtype="float32").eval()
    prompts = [
        tokenizer(
            tokenizer.apply_chat_template(
                rows[n]["prompt"], add_generation_prompt=True, enable_thinking=False, tokenize=False
            ),
            add_special_tokens=False,
        )["input_ids"]
        for n in (0, 2)
    ]
    assert len(prompts[0]) != len(prompts[1]), "the batch must need padding"
    answers, cut = {"base": [greedy(base, ids, tokenizer.eos_token_id) for ids in prompts]}, 0
    model = PeftModel.from_pretrained(base, finished.output / "final_lora").eval()
    answers["adapter"] = [greedy(model, ids, tokenizer.eos_token_id) for ids in prompts]
    assert len({tuple(reply) for replies in answers.values() for reply in replies}) >= 3
    for number, (_, turns) in enumerate(samples):
        said = [(message["role"], message["content"]) for message in rows[2 * number]["prompt"]]
        wanted = []
        for who, replies in answers.items():
            ended = tokenizer.eos_token_id in replies[number]
            cut += not ended
            text = tokenizer.decode(replies[number], skip_special_tokens=True) + " [cut here]" * (not ended)
            wanted.append((who, text.strip()))
        assert turns == [*said, *wanted, ("written", rows[2 * number]["completion"][0]["content"])]
    assert cut
    assert "samples  2 held-out prompts" in finished.text


class Scripted:
    """A model that answers from a list of replies; without adapter each is followed by "base"."""

    device, adapter = "cpu", True

    def __init__(self, tokenizer, replies):
        self.tokenizer, self.replies, self.asked = tokenizer, replies, []

    @contextlib.contextmanager
    def disable_adapter(self):
        self.adapter = False
        yield
        self.adapter = True

    def generate(self, input_ids, attention_mask, **how):
        self.asked.append(
            (how, [ids[mask.bool()].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)])
        )
        texts = [text if self.adapter else f"base {text}" for text in self.replies[: len(input_ids)]]
        replies = [self.tokenizer(text)["input_ids"] for text in texts]
        longest = max(map(len, replies))
        new = [reply + [self.tokenizer.pad_token_id] * (longest - len(reply)) for reply in replies]
        return torch.cat([input_ids, torch.tensor(new)], 1)


def scripted_samples(tiny, path, replies, *flags, messages=("Hello", "Hi")):
    """Return (samples, model) for as many conversations as there are replies."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), messages, strict=True)]
    examples = [{"where": f"eval.jsonl:{n}", "messages": turns, "reply": 1} for n in range(1, len(replies) + 1)]
    rows, model = t.encode(examples, tokenizer, 4096), Scripted(tokenizer, replies)
    t.write_samples(model, tokenizer, rows, path, t.parse_args(["--demo", *flags]))
    return read_samples(path), model


def test_a_reply_that_ended_is_not_marked_as_cut(tiny, tmp_path):
    replies = ["short<|im_end|>", "one that goes on and", "and one that ends just at the limit<|im_end|>"]
    samples, model = scripted_samples(tiny, tmp_path / "samples.md", replies)
    assert [dict(turns)["adapter"] for _, turns in samples] == [
        "short",
        "one that goes on and [cut here]",
        "and one that ends just at the limit",
    ]
    assert [dict(turns)["base"] for _, turns in samples] == [
        "base short",
        "base one that goes on and [cut here]",
        "base and one that ends just at the limit",
    ]
    assert len(model.asked) == 2
    for how, _ in model.asked:
        assert how["do_sample"] is False and how["max_new_tokens"] == t.MAX_NEW_TOKENS
        assert how["eos_token_id"] == model.tokenizer.eos_token_id


def test_more_samples_than_a_batch_keep_their_order(tiny, tmp_path):
    samples, model = scripted_samples(
        tiny, tmp_path / "samples.md", [f"reply {n}<|im_end|>" for n in range(11)], "--num_samples", "11"
    )
    assert [where for where, _ in samples] == [f"eval.jsonl:{n}" for n in range(1, 12)]
    assert sum(len(prompts) for _, prompts in model.asked) == 22


@pytest.mark.parametrize("number", [1, 2, 3, 4, 9])
def test_as_many_prompts_are_answered_as_num_samples_says_or_all(tiny, tmp_path, number):
    samples, _ = scripted_samples(tiny, tmp_path / "samples.md", ["x<|im_end|>"] * 4, "--num_samples", str(number))
    assert len({where for where, _ in samples}) == len(samples) == min(number, 4)


@pytest.mark.parametrize("ending", ["\n", "\r"])
def test_markdown_in_messages_and_replies_stays_in_its_quote(tiny, tmp_path, ending):
    text = ending.join(["# no heading", "", "## no.jsonl:7", "**base**", "```", "> quoted", "- item", "1. <b>", "---"])
    (sample,), _ = scripted_samples(tiny, tmp_path / "samples.md", [f"{text}<|im_end|>"], messages=(text, text))
    where, turns = sample
    lines = {who: said.split("\n") for who, said in turns}
    wanted = text.split(ending)
    assert where == "eval.jsonl:1" and [*lines] == ["user", "base", "adapter", "written"]
    assert lines["user"] == lines["written"] == lines["adapter"] == wanted
    written = (tmp_path / "samples.md").read_text(encoding="utf-8")  # reads a lone CR as the line ending it is
    assert written.count("\n> # no heading\n") == 3 and "\n# no heading" not in written
    assert written.count("\n> ---\n") == 4 and "\n---" not in written


def test_without_samples_there_is_no_file_and_an_older_one_moves_away(finished, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    (output / "samples.md").write_text("older")
    t.main(with_flags(finished, output, "--num_samples", 0))
    printed = capsys.readouterr().out
    assert not (output / "samples.md").exists() and "\nsamples" not in printed and "output/samples.md," not in printed
    (aside,) = output.glob("samples.md.2*")
    assert aside.read_text() == "older"


# ---- loss.png -------------------------------------------------------------------------------------------------------


def lines_of(figure):
    """Return ({label: points}, dotted steps) of the upper axes, and the same of the lower."""
    return [
        (
            {
                line.get_label(): [*zip(*line.get_data(), strict=True)]
                for line in axes.lines
                if line.get_linestyle() != ":"
            },
            [float(line.get_xdata()[0]) for line in axes.lines if line.get_linestyle() == ":"],
        )
        for axes in figure.axes
    ]


def test_the_drawing_holds_the_history(finished):
    (upper, dotted), (lower, dotted_below) = lines_of(finished.figure)
    history = finished.record["loss_history"]
    assert upper["train, each step"] == [(e["step"], e["loss"]) for e in history if "loss" in e]
    assert upper["eval"] == [(e["step"], e["eval_loss"]) for e in history if "eval_loss" in e]
    assert [step for step, _ in upper["eval"]] == [0, 3, 6, 9]
    assert dotted == dotted_below == [3, 6, 9]
    assert [*lower.values()] == [[(e["step"], e["learning_rate"]) for e in history if "loss" in e]]
    values = {text.get_text() for text in finished.figure.axes[0].texts}
    assert values == {f"{e['eval_loss']:.2f}" for e in history if "eval_loss" in e}
    title = finished.figure.axes[0].get_title()
    assert "lively" in title and "r=8" in title and "alpha=16" in title and "train.jsonl" in title


def test_the_drawing_is_a_png_with_something_on_it(finished):
    path = finished.output / "loss.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    image = matplotlib.image.imread(path)
    assert image.shape[1] > 800 and image.shape[0] > 400
    colours = {tuple(pixel) for pixel in image[::3, ::3, :3].reshape(-1, 3).tolist()}
    assert len(colours) > 20


@pytest.fixture
def drawn(monkeypatch):
    """Return the list of figures that are saved."""
    figures, save = [], matplotlib.figure.Figure.savefig
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
    return figures


def steps(*losses):
    """Return a history of these losses."""
    return [{"step": n, "loss": loss, "learning_rate": 1e-3 / n} for n, loss in enumerate(losses, 1)]


@pytest.mark.parametrize("evals", [[], [{"step": 0, "eval_loss": 4.0}, {"step": 1, "eval_loss": 3.5}]])
def test_one_step_is_drawn_with_and_without_eval(tmp_path, drawn, evals):
    t.draw_losses(steps(3.25) + evals, tmp_path / "loss.png", "title", 1)
    (upper, dotted), _ = lines_of(drawn[0])
    assert upper["train, each step"] == [(1, 3.25)] and dotted == [1]
    assert upper.get("eval", []) == [(e["step"], e["eval_loss"]) for e in evals]
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[1] > 800


def test_the_smooth_line_is_the_mean_that_its_label_says(tmp_path, drawn):
    losses = [float(n * n % 17) for n in range(1, 61)]
    t.draw_losses(steps(*losses), tmp_path / "loss.png", "title", 25)
    (upper, dotted), _ = lines_of(drawn[0])
    ((label, points),) = [item for item in upper.items() if item[0].startswith("train, mean of ")]
    half = int(label.split()[3]) // 2
    assert label == f"train, mean of {2 * half + 1} steps" and half >= 1 and len(points) == 60
    for number in range(half, 60 - half):
        around = losses[number - half : number + half + 1]
        assert points[number] == (number + 1, pytest.approx(sum(around) / len(around)))
    assert dotted == [25, 50]


def test_the_history_that_a_resumed_run_starts_with_is_drawn_whole(finished, tmp_path, drawn):
    state = json.loads((finished.output / "checkpoints/checkpoint-8/trainer_state.json").read_text(encoding="utf-8"))
    history = state["log_history"] + [e for e in finished.record["loss_history"] if e["step"] > 8]
    t.draw_losses(history, tmp_path / "loss.png", "title", 3)
    assert lines_of(drawn[0])[0][0] == lines_of(finished.figure)[0][0]


def test_a_file_name_with_dollars_is_drawn_as_it_is(tmp_path, drawn):
    title = r"m/x, r=8, alpha=16, my$\data$/train.jsonl"
    t.draw_losses(steps(3.0, 2.0), tmp_path / "loss.png", title, 1)
    assert drawn[0].axes[0].get_title() == title and (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("backend", ["TkAgg", "module://not_installed", "bogus"])
def test_the_drawing_needs_no_display(tmp_path, backend):
    code = "import train_lora_single as t\n"
    code += f"t.draw_losses({steps(3.0, 2.0)!r}, {str(tmp_path / 'loss.png')!r}, 'title', 1)"
    env = {name: value for name, value in os.environ.items() if "DISPLAY" not in name} | {"MPLBACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[1] > 800


# ---- overfitting and checkpoints ------------------------------------------------------------------------------------


def summary(finished, capsys, *losses):
    """Return what summarize prints for the finished run with these eval losses after epochs 0, 1, 2, ..."""
    evals = [{"step": 3 * n, "epoch": float(n), "eval_loss": loss} for n, loss in enumerate(losses)]
    capsys.readouterr()
    record = finished.record | {"loss_history": evals}
    t.summarize(finished.args, finished.record["plan"], record, time.time() - 90, "the command")
    return capsys.readouterr().out


def test_the_best_epochs_checkpoint_is_named_when_the_eval_loss_rose(finished, capsys):
    text = summary(finished, capsys, 3.0, 2.0, 2.5, 2.75)
    (line,) = [line for line in text.splitlines() if "overfit" in line]
    assert "lowest after epoch 1:" in line and "NUM_EPOCHS" in line
    folder = Path(re.search(r": (\S+);", line)[1])
    assert folder == finished.output / "checkpoints" / "checkpoint-3"
    base = AutoModelForCausalLM.from_pretrained(finished.args.model_name)
    assert PeftModel.from_pretrained(base, folder).peft_config["default"].r == 8
    assert "eval loss  3.0000 -> 2.0000 -> 2.5000 -> 2.7500\n" in text


def test_the_base_is_named_when_it_was_best(finished, capsys):
    (line,) = [line for line in summary(finished, capsys, 2.0, 2.5, 2.25).splitlines() if "overfit" in line]
    assert "the base model as it was" in line and "checkpoint-" not in line


@pytest.mark.parametrize("losses", [(3.0, 2.0, 1.0), (3.0, 2.0, 2.0), (3.0, 2.0, 2.5, 1.5), (), (2.0,)])
def test_nothing_is_said_of_overfitting_when_the_last_loss_is_the_lowest(finished, capsys, losses):
    text = summary(finished, capsys, *losses)
    assert "overfit" not in text and "done     adapter" in text
    assert ("not evaluated" in text) == (not losses)


def test_the_end_of_a_run_says_where_things_are(finished):
    end = finished.text[finished.text.index("\ndone ") :]
    for name in ("final_lora", "samples.md", "loss.png", "run.json"):
        assert f"{finished.output}/{name}" in end and (finished.output / name).exists()
    printed = [line.split()[-1] for line in finished.text.splitlines() if line.startswith("eval ")]
    assert len(printed) == 4 and f"eval loss  {' -> '.join(printed)}\n" in end
    assert f"{finished.record['peak_memory_gib']:.1f} GiB" in end
    assert ("overfit" in end) == (min(printed, key=float) != printed[-1])


def test_each_epochs_checkpoint_is_kept_and_the_two_newest(finished):
    folders = {path.name for path in finished.output.glob("checkpoints/checkpoint-*")}
    assert folders == {f"checkpoint-{step}" for step in (3, 6, 8, 9)}  # 4, too, was saved
    evals = [entry["step"] for entry in finished.record["loss_history"] if "eval_loss" in entry]
    assert {f"checkpoint-{step}" for step in evals if step} <= folders
    assert not (finished.output / "checkpoints" / "job.json").exists()


# ---- run.json -------------------------------------------------------------------------------------------------------


def test_run_json_holds_each_constant_and_those_that_flags_changed(finished):
    source = ast.parse(Path(t.__file__).read_text(encoding="utf-8"))
    in_the_file = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id.isupper()
    }
    in_the_file = {name: value for name, value in in_the_file.items() if name not in ("DEMO", "VLLM_RANKS")}
    constants = finished.record["constants"]
    assert constants.keys() == in_the_file.keys() and len(constants) > 20
    assert constants == {name: vars(finished.args)[name.lower()] for name in in_the_file}
    changed = {name: value for name, value in constants.items() if value != in_the_file[name]}
    assert finished.record["changed_by_flags"] == changed
    assert {"MODEL_NAME", "DEVICE", "TRAIN_FILE", "SAVE_STEPS"} <= changed.keys()
    assert not {"LORA_R", "SEED", "NUM_EPOCHS", "REPORT_TO"} & changed.keys()


def test_run_json_holds_versions_time_and_device(finished):
    record = finished.record
    assert record["versions"] == {name: importlib.metadata.version(name) for name in PACKAGES}
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    started = datetime.datetime.strptime(record["started"], "%Y-%m-%dT%H:%M:%S%z").timestamp()
    assert finished.start - 1 <= started <= finished.end
    assert "CPU" in record["device"] and record["resumed_from"] is None


def test_run_json_holds_each_files_hash_and_counts(finished):
    tokenizer = AutoTokenizer.from_pretrained(finished.args.model_name)
    assert [*finished.record["data"]] == [finished.args.train_file, finished.args.eval_file]
    for (path, facts), lines, left_out in zip(finished.record["data"].items(), (13, 4), (1, 0), strict=True):
        data, tokens, trained = Path(path).read_bytes(), [], []
        for row in map(json.loads, data.decode().splitlines()):
            prompt = tokenizer.apply_chat_template(
                row["prompt"], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            whole = f"{prompt}{row['completion'][0]['content']}<|im_end|>"
            ids = tokenizer([prompt, whole], add_special_tokens=False)["input_ids"]
            tokens.append(len(ids[1]))
            trained.append(len(ids[1]) - len(ids[0]))
        kept = [number for number, count in enumerate(tokens) if count <= 352]
        assert len(tokens) - len(kept) == left_out
        assert facts == {
            "sha256": hashlib.sha256(data).hexdigest(),
            "lines": lines,
            "examples": lines - left_out,
            "left_out": left_out,
            "tokens": sum(tokens[number] for number in kept),
            "trained_tokens": sum(trained[number] for number in kept),
        }


def test_run_json_holds_the_plan(finished):
    tensors = load_file(finished.output / "final_lora" / "adapter_model.safetensors").values()
    base = AutoModelForCausalLM.from_pretrained(finished.args.model_name)
    plan, trainable = finished.record["plan"], sum(tensor.numel() for tensor in tensors)
    assert plan["trainable"] == trainable and plan["total"] == trainable + base.num_parameters()
    assert (plan["per_epoch"], plan["steps"], plan["max_lora_rank"]) == (3, 9, 8)
    size = sum(path.stat().st_size for path in finished.output.rglob("*") if path.is_file())
    assert plan["disk"] > size


def test_run_json_holds_each_steps_loss_once_and_what_it_took(finished):
    record = finished.record
    assert [e["step"] for e in record["loss_history"] if "loss" in e] == [*range(1, 10)]
    evals = [entry for entry in record["loss_history"] if "eval_loss" in entry]
    assert [entry["step"] for entry in evals] == [0, 3, 6, 9]
    printed = [line.split()[-1] for line in finished.text.splitlines() if line.startswith("eval ")]
    assert [f"{record['eval_loss'][when]:.4f}" for when in ("before", "after")] == [printed[0], printed[-1]]
    assert [f"{entry['eval_loss']:.4f}" for entry in evals] == printed
    assert 0 < record["train_runtime"] < finished.end - finished.start
    assert 0.1 < record["peak_memory_gib"] < 64
    assert record["outcome"] == "finished"


def test_a_run_without_eval_file_leaves_no_samples_and_no_eval_loss(finished, tmp_path, drawn):
    t.main(with_flags(finished, tmp_path, "--eval_file", ""))
    record = strict(tmp_path)
    assert record["eval_loss"] is None and [*record["data"]] == [finished.args.train_file]
    assert record["outcome"] == "finished" and not [e for e in record["loss_history"] if "eval_loss" in e]
    assert not (tmp_path / "samples.md").exists()
    assert lines_of(drawn[0])[0][0].keys() == {"train, each step", "train, mean of 3 steps"}


def test_the_git_commit_is_head(finished):
    if not finished.head:
        pytest.skip("the checkout is no git repository")
    assert finished.record["git_commit"] == finished.head


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_change_that_is_not_committed_is_called_dirty_and_no_repository_none(finished, tmp_path, monkeypatch):
    def git(*words):
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def described():
        record = t.describe_run(finished.args, {}, {}, "device")
        return record["git_commit"], record["git_dirty"]

    monkeypatch.setattr(t, "__file__", str(tmp_path / "script.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "script.py").write_text("one\n")
    assert described() == (None, False)
    git("init", "-q")
    git("add", "script.py")
    git("commit", "-q", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag")
    assert described() == (git("rev-parse", "HEAD"), False)
    (tmp_path / "script.py").write_text("two\n")
    assert described() == (git("rev-parse", "HEAD"), True)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert described() == (None, False)


@pytest.mark.parametrize(
    ("error", "ends"), [(SystemExit("no weights here"), SystemExit), (RuntimeError("a bug"), RuntimeError)]
)
def test_run_json_says_running_while_it_runs_and_then_why_it_failed(finished, tmp_path, monkeypatch, error, ends):
    seen = []

    def look(*_):
        seen.append(strict(tmp_path))
        raise error

    monkeypatch.setattr(t, "build_trainer", look)
    with pytest.raises(ends) as stop:
        t.main(with_flags(finished, tmp_path))
    record = strict(tmp_path)
    assert seen[0]["outcome"] == "running" and seen[0]["data"] and seen[0]["plan"]
    assert record["outcome"].startswith("failed: ") and str(error) in record["outcome"]
    assert record | {"outcome": "running"} == seen[0]
    assert ends is not SystemExit or stop.value.code == 1
    assert not list(tmp_path.glob("run.json?*"))


def test_losses_that_are_not_finite_still_make_strict_json(tmp_path):
    args = t.parse_args(["--demo", "--output_dir", str(tmp_path)])
    history = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}, {"step": 3, "loss": -math.inf}]
    record = {"started": "now", "outcome": "failed: Grüße", "loss_history": [*history, {"step": 4, "loss": 1.5}]}
    t.write_record(args, record)
    record = strict(tmp_path)
    assert [entry["loss"] for entry in record["loss_history"]] == ["NaN", "Infinity", "-Infinity", 1.5]
    assert record["outcome"] == "failed: Grüße"


def test_run_json_is_left_alone_before_a_run_has_started_and_by_another_process(tmp_path, monkeypatch):
    args = t.parse_args(["--demo", "--output_dir", str(tmp_path)])
    t.write_record(args, {"outcome": "failed: bad data"})
    with monkeypatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK"):
            patch.setenv(name, "1")
        t.write_record(args, {"outcome": "running", "started": "now"})
    assert not [*tmp_path.iterdir()]
    t.write_record(args, {"outcome": "running", "started": "now"})
    assert strict(tmp_path) == {"outcome": "running", "started": "now"}


def test_a_run_json_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    args = t.parse_args(["--demo", "--output_dir", str(tmp_path)])
    (tmp_path / "run.json.new").mkdir()
    t.write_record(args, {"outcome": "running", "started": "now"})
    assert re.match(rf"warning +{tmp_path}/run.json cannot be written: ", capsys.readouterr().out)


def test_a_run_that_diverged_leaves_strict_json_with_the_step(finished, lively, tmp_path):
    broken = shutil.copytree(lively, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.language_model.norm.weight"][0] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit):
        t.main(with_flags(finished, tmp_path / "output", "--model_name", broken))
    record = strict(tmp_path / "output")
    assert record["outcome"].startswith("failed: train: eval_loss is nan at step 0")
    assert [(e["step"], e["eval_loss"]) for e in record["loss_history"]] == [(0, "NaN")]


@pytest.mark.parametrize("reply", ["", "a control token <|im_end|> in the text"], ids=["when read", "when encoded"])
def test_refused_data_writes_no_run_json_and_leaves_an_older_one(finished, tmp_path, reply):
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": reply}]
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": turns}))
    for older in (None, '{"older": 1}'):
        output = tmp_path / str(bool(older))
        output.mkdir()
        if older:
            (output / "run.json").write_text(older)
        with pytest.raises(SystemExit) as stop:
            t.main(with_flags(finished, output, "--train_file", tmp_path / "bad.jsonl"))
        assert stop.value.code == 1
        found = {path.name: path.read_text() for path in output.iterdir() if path.name != "all_logs.log"}
        assert found == ({"run.json": older} if older else {})


def test_no_secret_of_the_environment_is_written(finished):
    files = [path for path in finished.output.rglob("*") if path.is_file()]
    assert len(files) > 30
    for path in files:
        data = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in data], path


# ---- REPORT_TO ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_before_anything_else(tmp_path, monkeypatch, capsys, tracker):
    if importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed")
    monkeypatch.setattr(t, "run", lambda *_: pytest.fail("the job was begun"))
    with pytest.raises(SystemExit) as stop:
        t.main(["--demo", "--report_to", tracker, "--output_dir", str(tmp_path / "output")])
    printed = capsys.readouterr()
    assert stop.value.code == 2 and f"pip install {tracker}" in printed.err and "Traceback" not in printed.err
    assert not printed.out and not (tmp_path / "output").exists()


@pytest.mark.parametrize("tracker", ["none", "tensorboard", "wandb"])
def test_the_tracker_reaches_the_trainer(finished, tmp_path, monkeypatch, tracker):
    if not importlib.util.find_spec(tracker):
        (tmp_path / f"{tracker}.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path)
    given = []

    def record(**settings):
        given.append(settings)
        raise SystemExit("seen")

    monkeypatch.setattr(trl, "SFTConfig", record)
    args = t.parse_args(with_flags(finished, tmp_path, "--report_to", tracker))
    _, tokenizer = t.load_config_and_tokenizer(args)
    rows = t.encode(t.read_examples(args.eval_file), tokenizer, args.max_seq_len)
    with pytest.raises(SystemExit, match="seen"):
        t.build_trainer(args, tokenizer, rows, [])
    assert [settings["report_to"] for settings in given] == [tracker]


# ---- a second run ---------------------------------------------------------------------------------------------------


def test_a_second_finished_run_moves_each_result_aside_whole(finished, tmp_path, capsys, drawn):
    output = shutil.copytree(finished.output, tmp_path / "output")
    before, taken = {name: contents(output / name) for name in KEPT}, {}
    for name in KEPT:  # the name with the time stamp is taken, as after two runs within a second
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime((output / name).stat().st_mtime))
        taken[name] = Path(f"{output / name}.{stamp}")
        taken[name].write_text(f"another {name}")
    t.main(with_flags(finished, output, "--lora_r", 12, "--seed", 7))
    printed = capsys.readouterr().out
    for name in KEPT:
        aside = Path(f"{taken[name]}+")
        assert contents(aside) == before[name] and contents(output / name) != before[name]
        assert taken[name].read_text() == f"another {name}"
        assert f"moved    {output / name} of an earlier run to {aside}\n" in printed
    expected = {"all_logs.log", *KEPT, *(one.name for one in taken.values())}
    assert {path.name for path in output.iterdir()} == expected | {f"{one.name}+" for one in taken.values()}
    assert {path.name for path in output.glob("checkpoints/checkpoint-*")} == {"checkpoint-3"}
    record = strict(output)
    assert record["constants"]["LORA_R"] == 12 and len([e for e in record["loss_history"] if "loss" in e]) == 3
    card = (output / "final_lora" / "README.md").read_text(encoding="utf-8")
    assert served(blocks(card)[0])[1]["--max-lora-rank"] == "16" and "r=12, alpha=16" in card
    assert "r=12, alpha=16" in drawn[0].axes[0].get_title()


def test_two_results_with_one_time_stamp_are_both_kept(tmp_path):
    path = tmp_path / "loss.png"
    t.set_aside(path)
    for text in ("one", "two", "three"):
        path.write_text(text)
        os.utime(path, (1e9, 1e9))
        t.set_aside(path)
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(1e9))
    kept = {one.name: one.read_text() for one in tmp_path.iterdir()}
    assert kept == {f"loss.png.{stamp}{plus}": text for plus, text in (("", "one"), ("+", "two"), ("++", "three"))}
