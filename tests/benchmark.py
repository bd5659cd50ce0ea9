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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft  # noqa: E402
import transformers  # noqa: E402

import train_lora_single as t  # noqa: E402

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
    checkouts = {"this checkout": ROOT, str(asked.against or "trl sft"): asked.against}
    found, losses = {which: [] for which in checkouts}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = asked.model or text_model(folder / "model")
        (folder / "data").mkdir()
        data = first_lines("train", asked.lines, folder / "data" / "train.jsonl")
        for pair in range(asked.pairs):
            for number, (which, checkout) in enumerate(checkouts.items()):
                output, before = folder / f"{pair} {number}", processor_seconds()
                seconds = train(checkout, model, data, output)
                found[which].append((seconds, processor_seconds() - before))
                adapter = output / "final_lora" if checkout else output
                losses[which] = losses.get(which) or held_out_loss(model, adapter, folder)
    print(f"{Path(model).name}, {asked.lines} lines; medians of {asked.pairs} runs, in seconds")
    for which, times in found.items():
        training, whole = map(statistics.median, zip(*times, strict=True))
        print(f"{which:<24}training {training:8.1f}   processors {whole:8.1f}   ", end="")
        print(f"held-out loss {losses[which]:.4f}   each: {[round(one, 1) for one, _ in times]}")
    for column, label in enumerate(("training", "processors' time")):
        pairs = zip(*found.values(), strict=True)
        ratio = statistics.median(ours[column] / theirs[column] for ours, theirs in pairs)
        print(f"{label}: {ratio:.3f} of the other's (median of pairs)")
    ours, theirs = losses.values()
    apart = abs(ours / theirs - 1)
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


def train(checkout: Path | None, model: str, data: Path, output: Path) -> float:
    """Train with a checkout's script or with TRL's command; return Trainer.train()'s seconds."""
    settings = {name: getattr(t, name.upper()) for name in SETTINGS}
    settings |= {"dtype": "float32", "output_dir": output, "num_train_epochs": 1}
    if checkout:
        words = ["train_lora_single.py"]
        settings["num_epochs"] = settings.pop("num_train_epochs")
        settings |= {"model_name": model, "train_file": data, "eval_file": "", "device": "cpu"}
    else:
        words = ["-m", "trl.scripts.sft"]
        settings |= {"model_name_or_path": model, "dataset_name": data.parent, "use_peft": True}
        settings |= {"per_device_train_batch_size": t.BATCH_SIZE, "use_cpu": True, "bf16": False}
        settings |= {"gradient_accumulation_steps": t.GRADIENT_ACCUMULATION_STEPS}
        settings |= {"max_length": t.MAX_SEQ_LEN, "report_to": "none"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--lora_target_modules", *t.LORA_TARGET_MODULES]
    command = [sys.executable, *words, *flags]
    done = subprocess.run(command, cwd=checkout or ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    if not checkout:
        return float(re.findall(r"'train_runtime': '?([\d.e+]+)", done.stdout + done.stderr)[-1])
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    return [one for one in record["loss_history"] if "train_runtime" in one][-1]["train_runtime"]


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
