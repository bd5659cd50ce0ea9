"""README.md: its commands stand alone, its code runs, and its tables hold what the script holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_inspector

import train_lora_single as t

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def block_with(text):
    """Return the code of the one block that holds a text."""
    found = [code for _, code in BLOCKS if text in code]
    assert len(found) == 1, f"{len(found)} blocks hold {text}"
    return found[0]


def test_every_block_says_its_language_and_nothing_is_left_to_fill_in():
    assert all(language for language, _ in BLOCKS)
    assert "@@" not in README


def test_the_command_to_run_and_the_one_to_test_have_blocks_of_their_own():
    assert block_with("python train_lora_single.py --demo\n").count("\n") == 1
    assert block_with("python -m pytest\n").count("\n") == 1


def test_every_link_to_a_file_leads_to_one():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    files = [link for link in links if not link.startswith("http")]
    assert len(files) >= 4
    assert [link for link in files if not Path(link).exists()] == []


def test_the_table_of_settings_holds_ten_of_the_files_settings_in_order():
    rows = re.findall(r"^\| `([A-Z_0-9]+)` \| (.+?) \| (.+?) \|$", README, re.MULTILINE)
    names = [name for name, _, _ in rows]
    assert len(names) == 10 and names == [name for name in t.setting_types() if name in names]
    for name, default, text in rows:
        value = getattr(t, name)
        shown = " ".join(value) if isinstance(value, list) else value
        assert default == (f"`{shown}`" if shown != "" else "none"), name
        assert len(text) > 10, name


def test_the_file_for_slurm_works_as_it_is_pasted(tmp_path):
    text = block_with("#SBATCH")
    lines = text.splitlines()
    assert lines[0].startswith("#!")
    directives = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert directives == list(range(1, len(directives) + 1))  # before the first command
    (tmp_path / "job").write_text(text, encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(tmp_path / "job")]).returncode == 0


def test_the_minutes_on_a_v100_are_those_of_the_last_estimate():
    measured = Path("tests/README.md").read_text(encoding="utf-8")
    found = re.findall(r"^(bf16|fp16) +([\d.]+) +([\d.]+)$", measured, re.MULTILINE)
    assert [name for name, _, _ in found] == ["bf16", "fp16"] * 2  # on 32 GB and on 16
    text = " ".join(README.split())
    for _, quick, slow in found:
        assert f"{quick} to {slow}" in text, (quick, slow)


def rows_of(*names):
    """Return turns of a file of the ShareGPT form, each of which says its name and its place."""
    return [{"from": name, "value": f"{name} {place}"} for place, name in enumerate(names)]


def test_the_converter_turns_sharegpt_and_alpaca_files_into_what_is_accepted(tmp_path):
    turns = [("gpt", "Hi."), ("human", "one\ntwo"), ("gpt", "2"), ("user", "3"), ("gpt", "4")]
    rows = [
        {"id": 1, "conversations": [{"from": who, "value": text} for who, text in turns]},
        {"instruction": "Translate.", "input": "Haus", "output": "house"},
        {"instruction": "Say hello.", "input": "", "output": "Hello."},
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                *rows_of("gpt", "human", "gpt"),
            ]
        },
        {"system": "Be brief.", "conversations": rows_of("human", "gpt", "human")},
        {"conversations": rows_of("gpt", "human")},
    ]
    (tmp_path / "in.json").write_text(json.dumps(rows), encoding="utf-8")
    command = [sys.executable, "-c", block_with("import json, sys"), str(tmp_path / "in.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "out.jsonl").write_text(done.stdout, encoding="utf-8")
    examples, problems = t.read_examples(str(tmp_path / "out.jsonl"))
    assert problems == []
    replies = [example.messages[-1]["content"] for example in examples]
    assert replies == ["2", "4", "house", "Hello.", "gpt 2", "gpt 1"]
    assert [one.system_message for one in examples[-2:]] == ["Be kind.", "Be brief."]
    assert examples[2].messages[0]["content"] == "Translate.\n\nHaus"


def test_the_example_lines_are_accepted(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text(block_with('{"prompt": [{"role": "system"'), encoding="utf-8")
    examples, problems = t.read_examples(str(path))
    assert (len(examples), problems) == (2, [])


def test_the_python_for_merging_gives_a_model_that_answers_like_the_adapter(
    finished, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code = block_with("merge_and_unload")
    code = code.replace("output/final_lora", str(finished / "final_lora"))
    code = code.replace("Qwen/Qwen3.5-4B", tiny).replace('dtype="auto"', 'dtype="float32"')
    names = {}
    exec(code, names)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = AutoModelForCausalLM.from_pretrained("merged", dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert tokenizer.chat_template
    assert json.loads(Path("merged/config.json").read_text())["architectures"] == [
        "Qwen3_5ForCausalLM"
    ]
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32")
    adapter = PeftModel.from_pretrained(base, finished / "final_lora").eval()
    ids = torch.tensor([tokenizer.encode("Good morning, Nell.")])
    with torch.no_grad():
        one, other = merged(input_ids=ids).logits, adapter(input_ids=ids).logits
        with adapter.disable_adapter():
            untrained = adapter(input_ids=ids).logits
    assert torch.allclose(one, other, atol=1e-4)
    assert not torch.allclose(one, untrained, atol=1e-2)


# What the text part of Qwen/Qwen3.5-4B's config.json says.
QWEN = {
    "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip


def test_the_plan_is_what_the_script_prints_for_the_real_sizes(tiny, tmp_path, capsys):
    from transformers import AutoTokenizer, Qwen3_5Config

    config = Qwen3_5Config(text_config=QWEN, tie_word_embeddings=True)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path)
    t.main(["--dry_run", "--model_name", str(tmp_path)])
    printed = capsys.readouterr().out
    plan = printed[printed.index("\nplan ") + 1 : printed.index("\ndone ")]
    assert block_with("trainable params: 10,616,832") == f"{plan}\n"


@pytest.mark.parametrize("name", ["bad.jsonl"])
def test_the_messages_on_bad_lines_are_the_scripts(name, tmp_path):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    lines = [
        good.replace('"b"}', '"b"'),
        good.replace("assistant", "user"),
        good.replace('"b"', '"<think>a</think>b"'),
    ]
    (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    _, problems = t.read_examples(str(tmp_path / name))
    shown = block_with("data/train.jsonl:17").splitlines()
    for problem, line in zip(problems, shown, strict=True):
        advice = problem.rpartition("; ")[2] if "; " in problem else "this is not JSON: Expecting"
        assert advice in line


@pytest.mark.parametrize(
    "name", ["train_lora_single.py", pytest.param("inspect_lora.py", marks=needs_inspector)]
)
def test_the_header_for_uv_is_requirements_txt(name):
    import tomllib

    script = Path(name).read_text(encoding="utf-8")
    block = re.search(r"^# /// script\n(.*?)^# ///$", script, re.MULTILINE | re.DOTALL)[1]
    header = tomllib.loads("\n".join(line[2:] for line in block.splitlines()))
    lines = Path("requirements.txt").read_text(encoding="utf-8").splitlines()
    assert header["dependencies"] == [line for line in lines if not line.startswith("#")]
    assert header["requires-python"] == ">=3.11"


def test_the_header_of_the_second_file_is_the_same():
    names = ("train_lora_single.py", "inspect_lora.py")
    # Everything here stays true without the second file.
    texts = [Path(name).read_text(encoding="utf-8") for name in names if Path(name).exists()]
    header = re.compile(r"^# /// script\n(.*?)^# ///$", re.DOTALL | re.MULTILINE)
    assert len({header.search(text)[1] for text in texts}) == 1


def test_the_first_screen_is_one_screen():
    """Name, status, the command, a result and where to go, in at most 40 lines of 120 columns."""
    first = README.split("\n## ")[0].rstrip().split("\n")
    assert len(first) <= 40
    assert max(map(len, first)) <= 120
    assert README.count("run on a GPU yet") <= 2  # once for the project, once for a command
