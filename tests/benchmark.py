"""Compare the script's speed with another's, in turn, on this machine's CPU.

    python tests/benchmark.py                        against `trl sft` with the same settings
    python tests/benchmark.py --against ../checkout  against another checkout of this project
    python tests/benchmark.py --model FOLDER         with another text model

Each pair trains LoRA on the same lines of data/train.jsonl, and the loss of both adapters on the
same lines of data/eval.jsonl must agree. Other work on the machine spoils the clock, but hardly the
processors' time, which counts the whole command, imports included.
"""

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: E402
import transformers  # noqa: E402

import train_lora_single as t  # noqa: E402

OURS = "this checkout"
LOSSES_APART = 0.01
SETTINGS = ["seed", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "lr_scheduler_type"]


def main() -> int:
    """Train in turn and print a table; return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout [trl sft]")
    parser.add_argument("--model", help="the folder of a chat model [the demo's text part]")
    parser.add_argument("--lines", type=int, default=64, help="how many to train on [64]")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each [5]")
    asked = parser.parse_args()
    other = str(asked.against or "trl sft")
    clock, busy, losses = defaultdict(list), defaultdict(list), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asked.model or text_model(folder / "model")
        (folder / "data").mkdir()
        data = first_lines("train", asked.lines, folder / "data" / "train.jsonl")
        for pair in range(asked.pairs):
            for which in (OURS, other):
                output = folder / f"{pair} {which == OURS}"
                before = processor_seconds()
                if which == "trl sft":
                    seconds = with_trl(model, data, output)
                else:
                    checkout = ROOT if which == OURS else asked.against
                    seconds = with_script(checkout, model, data, output)
                clock[which].append(seconds)
                busy[which].append(processor_seconds() - before)
                adapter = output / "final_lora"
                adapter = adapter if adapter.is_dir() else output
                losses[which] = losses.get(which) or held_out_loss(model, adapter, folder)
    print(f"{Path(model).name}, {asked.lines} lines; medians of {asked.pairs} runs, in seconds")
    for which in (OURS, other):
        training, whole = statistics.median(clock[which]), statistics.median(busy[which])
        each = "  ".join(f"{one:.1f}" for one in clock[which])
        print(
            f"{which:<24}training {training:8.1f}   processors {whole:8.1f}   "
            f"held-out loss {losses[which]:.4f}   each: {each}"
        )
    for label, times in (("training", clock), ("processors' time", busy)):
        ratios = [ours / theirs for ours, theirs in zip(times[OURS], times[other], strict=True)]
        print(f"{label}, of that of {other}: {statistics.median(ratios):.3f} (median of pairs)")
    apart = abs(losses[OURS] / losses[other] - 1)
    print(f"held-out losses {apart:.2%} apart, at most {LOSSES_APART:.0%} allowed")
    return 1 if apart > LOSSES_APART else 0


def text_model(folder: Path) -> str:
    """Write the text part of the demo's model, which TRL's command can load; return its path."""
    demo = ROOT / "data" / "demo-model"
    transformers.AutoModelForCausalLM.from_pretrained(demo).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
    return str(folder)


def first_lines(name: str, count: int, path: Path) -> Path:
    """Write the first lines of a shipped file, and return the path."""
    lines = (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


def processor_seconds() -> float:
    """Return the time that all processors have spent on the commands so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def command(words: list[str], settings: dict[str, object], folder: Path) -> str:
    """Run Python in a folder, with what both commands call by the same names; return the output."""
    settings |= {name: getattr(t, name.upper()) for name in SETTINGS} | {"dtype": "float32"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--lora_target_modules", *t.LORA_TARGET_MODULES]
    done = subprocess.run(
        [sys.executable, *words, *flags], cwd=folder, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def with_script(checkout: Path, model: str, data: Path, output: Path) -> float:
    """Train with a checkout's script; return the seconds of Trainer.train(), as TRL prints them."""
    settings = {"model_name": model, "train_file": data, "eval_file": "", "output_dir": output}
    command(["train_lora_single.py"], settings | {"num_epochs": 1, "device": "cpu"}, checkout)
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return [one for one in record["loss_history"] if "train_runtime" in one][-1]["train_runtime"]


def with_trl(model: str, data: Path, output: Path) -> float:
    """Train with TRL's command, whose other defaults hold; return the seconds that it prints."""
    settings = {"model_name_or_path": model, "dataset_name": data.parent, "output_dir": output}
    settings |= {"num_train_epochs": 1, "per_device_train_batch_size": t.BATCH_SIZE}
    settings |= {"gradient_accumulation_steps": t.GRADIENT_ACCUMULATION_STEPS}
    settings |= {"max_length": t.MAX_SEQ_LEN, "use_peft": True, "use_cpu": True, "bf16": False}
    printed = command(["-m", "trl.scripts.sft"], settings | {"report_to": "none"}, ROOT)
    return float(re.findall(r"'train_runtime': '?([\d.e+]+)", printed)[-1])


def held_out_loss(model: str, adapter: Path, folder: Path) -> float:
    """Return an adapter's loss on held-out lines, in nats a target token."""
    data = first_lines("eval", 32, folder / "eval.jsonl")
    job = t.Job(t.parse_settings(["--dry_run", f"--model_name={model}", f"--train_file={data}"]))
    t.read_model_files(job)
    problems: list[str] = []
    examples = t.encode(t.read_conversations(str(data), "all", problems), job, problems)
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    losses = t.example_losses(peft.PeftModel.from_pretrained(base, adapter), examples)
    return sum(losses) / sum(len(example.reply_ids) for example in examples)


if __name__ == "__main__":
    sys.exit(main())
