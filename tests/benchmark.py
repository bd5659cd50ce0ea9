"""Compare the script's speed with another's, in turn, on this machine's CPU.

    python tests/benchmark.py                        against `trl sft` with the same settings
    python tests/benchmark.py --dialogues 12         the same, with dialogues of eight replies
    python tests/benchmark.py --dialogues 12 --long  of long replies: half of the tokens are targets
    python tests/benchmark.py --dialogues 12 --single    against the same replies, one an example
    python tests/benchmark.py --against ../checkout  against another checkout of this project
    python tests/benchmark.py --model FOLDER         with another text model

What is compared is the time of all processors for the whole command, imports included. Other work
on the machine spoils the clock, but hardly this time. Both train LoRA on the same lines of
data/train.jsonl, without gradient checkpointing, and the losses of both adapters on the same lines
of data/eval.jsonl must agree. A dialogue is several shipped conversations, one after the other,
under their system message; a long reply is two shipped ones. Where replies are joined, the tokens
of all rows may be at most 1.01 times those of the rendered dialogues. `trl sft` trains on every
token of a dialogue, also on what the user says, and single replies take eight times as many steps,
so the two losses are printed and need not agree.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait for others count as work, too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import peft
import transformers

import train_lora_single as script
from train_lora.base import one_pass_template, read_base
from train_lora.conversations import read_conversations
from train_lora.jobs import request_of
from train_lora.losses import losses_of_replies
from train_lora.tokens import encode

LOSSES_APART = 0.01
REPLIES_OF_A_DIALOGUE = 8
MOST_TOKENS = 1.01  # of the rendered dialogues'
MAX_SEQ_LEN = 2048
SETTINGS = ["seed", "lora_r", "lora_alpha", "lora_dropout", "learning_rate", "lr_scheduler_type"]


def main() -> int:
    """Train in turn and print a table; return 1 if the losses do not agree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", type=Path, help="another checkout [trl sft]")
    parser.add_argument("--model", help="the folder of a chat model [the demo's text part]")
    parser.add_argument("--lines", type=int, default=64, help="how many to train on [64]")
    parser.add_argument("--dialogues", type=int, help="train on so many dialogues instead")
    parser.add_argument("--long", action="store_true", help="make their replies twice as long")
    parser.add_argument("--single", action="store_true", help="of these dialogues, reply by reply")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each [5]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or write_text_model(folder / "model")
        data = folder / "data" / "train.jsonl"
        rows = shipped_rows("train")
        if options.dialogues:
            rows = dialogues(options.dialogues, parts_of_a_reply=2 if options.long else 1)
        write_rows(data, rows, options.dialogues or options.lines)
        sides = {"this checkout": (ROOT, data)}
        if options.single:
            replies = write_rows(folder / "single" / "train.jsonl", single_replies(data), 10**6)
            sides["single replies"] = (ROOT, replies)
        else:
            sides[str(options.against or "trl sft")] = (options.against, data)
        times: dict[str, list[float]] = {side: [] for side in sides}
        losses: dict[str, float] = {}
        facts: dict[str, dict[str, Any]] = {}  # what a checkout records of its data
        more = ["--chat_template=one_pass"] if options.dialogues and knows_one_pass(model) else []
        for pair in range(options.pairs):
            for number, (side, (checkout, path)) in enumerate(sides.items()):
                output = folder / f"{pair} {number}"
                seconds = processor_seconds_of_training(checkout, model, path, output, more)
                times[side].append(seconds)
                print(f"{side:<24}{seconds:8.1f} s", flush=True)
                if side not in losses:
                    adapter = output / "final_lora" if checkout else output
                    losses[side] = held_out_loss(model, adapter, folder)
                if checkout:
                    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
                    facts[side] = record["data"]["train"]
        rendered = tokens_of(model, data, more) if options.dialogues else 0
    lines = f"{options.dialogues} dialogues" if options.dialogues else f"{options.lines} lines"
    print(f"\n{Path(model).name}, {lines}; processors' time, medians of {options.pairs} runs")
    for side, seconds in times.items():
        print(f"{side:<24}{statistics.median(seconds):8.1f} s   ", end="")
        print(f"held-out loss {losses[side]:.4f}")
    ours, theirs = times.values()
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    print(f"{statistics.median(ratios):.3f} of the other's, the median of ", end="")
    print(", ".join(f"{ratio:.3f}" for ratio in sorted(ratios)))
    our_loss, their_loss = losses.values()
    apart = abs(our_loss / their_loss - 1)
    must_agree = not options.dialogues or options.against
    is_joined = options.dialogues and not options.single
    for side, counts in facts.items() if rendered else ():
        tokens, targets = counts["tokens"], counts["targets"]
        print(f"{side:<24}{tokens:8,} tokens, {tokens / rendered:.3f} of the rendered dialogues'")
        print(f"{targets / tokens:31.0%} are targets")
    print(f"held-out losses {apart:.2%} apart", end="")
    print(f", at most {LOSSES_APART:.0%} allowed" if must_agree else "")
    if is_joined and facts["this checkout"]["tokens"] > MOST_TOKENS * rendered:
        return 1
    return 1 if must_agree and apart > LOSSES_APART else 0


def write_text_model(folder: Path) -> str:
    """Write the text part of the demo's model, which TRL's command can load; return its path."""
    demo = ROOT / "data" / "demo-model"
    transformers.AutoModelForCausalLM.from_pretrained(demo).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(demo).save_pretrained(folder)
    return str(folder)


def shipped_rows(name: str) -> Iterator[dict[str, Any]]:
    """Yield the lines of a shipped file."""
    for line in (ROOT / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def dialogues(count: int, parts_of_a_reply: int) -> Iterator[dict[str, Any]]:
    """Yield dialogues of eight replies, made of shipped conversations one after the other."""
    rows = shipped_rows("train")
    for _ in range(count):
        turns: list[dict[str, str]] = []
        while len(turns) < 2 * REPLIES_OF_A_DIALOGUE:
            row = next(rows)
            system, *asked = row["prompt"]
            replies = [row, *(next(rows) for _ in range(parts_of_a_reply - 1))]
            text = "\n\n".join(reply["completion"][0]["content"] for reply in replies)
            turns += [*asked, {"role": "assistant", "content": text}]
        yield {"messages": [system, *turns[: 2 * REPLIES_OF_A_DIALOGUE]]}


def single_replies(path: Path) -> Iterator[dict[str, Any]]:
    """Yield a line for each reply of a file of dialogues, with all that comes before it."""
    for line in path.read_text(encoding="utf-8").splitlines():
        messages = json.loads(line)["messages"]
        for place, message in enumerate(messages):
            if message["role"] == "assistant":
                yield {"prompt": messages[:place], "completion": [message]}


def write_rows(path: Path, rows: Iterator[dict[str, Any]], count: int) -> Path:
    """Write the first rows as JSONL, and return the path."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row) + "\n" for row, _ in zip(rows, range(count), strict=False)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def knows_one_pass(model: str) -> bool:
    """Return whether --chat_template one_pass is possible."""
    return bool(one_pass_template(transformers.AutoTokenizer.from_pretrained(model)))


def tokens_of(model: str, path: Path, flags: list[str]) -> int:
    """Return the number of tokens of a file's dialogues as the chat template renders them."""
    settings = script.parse_settings(vars(script), ["--dry_run", f"--model_name={model}", *flags])
    apply = read_base(request_of(settings)).tokenizer.apply_chat_template
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    rendered = [apply(row["messages"], enable_thinking=False)["input_ids"] for row in rows]
    return sum(map(len, rendered))


def processor_seconds() -> float:
    """Return the time that all processors have spent on the commands so far."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def processor_seconds_of_training(
    checkout: Path | None, model: str, data: Path, output: Path, more: list[str]
) -> float:
    """Train with a checkout's script and these flags, too, or with TRL's; return what it took."""
    settings = {name: getattr(script, name.upper()) for name in SETTINGS}
    settings |= {"dtype": "float32", "output_dir": output, "num_train_epochs": 1}
    if checkout:
        words = ["train_lora_single.py"]
        settings["num_epochs"] = settings.pop("num_train_epochs")
        settings |= {"model_name": model, "train_file": data, "eval_file": "", "device": "cpu"}
        settings |= {"max_seq_len": MAX_SEQ_LEN}
    else:
        words = ["-m", "trl.scripts.sft"]
        settings |= {"model_name_or_path": model, "dataset_name": data.parent, "use_peft": True}
        settings |= {"per_device_train_batch_size": script.BATCH_SIZE, "use_cpu": True}
        settings |= {"gradient_accumulation_steps": script.GRADIENT_ACCUMULATION_STEPS}
        settings |= {"gradient_checkpointing": False, "bf16": False}
        settings |= {"max_length": MAX_SEQ_LEN, "report_to": "none"}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--lora_target_modules", *script.LORA_TARGET_MODULES]
    command = [sys.executable, *words, *flags, *(more if checkout else [])]
    before = processor_seconds()
    done = subprocess.run(command, cwd=checkout or ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return processor_seconds() - before


def held_out_loss(model: str, adapter: Path, folder: Path) -> float:
    """Return an adapter's loss on held-out lines, in nats a target token."""
    data = write_rows(folder / "eval.jsonl", shipped_rows("eval"), 32)
    settings = script.parse_settings(vars(script), ["--dry_run", f"--model_name={model}"])
    base = read_base(request_of(settings))
    problems: list[str] = []
    conversations = read_conversations(str(data), "all", problems)
    examples = encode(conversations, base, MAX_SEQ_LEN, problems, "held-out")
    network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    losses = losses_of_replies(peft.PeftModel.from_pretrained(network, adapter), examples)
    return sum(map(sum, losses)) / sum(example.targets for example in examples)


if __name__ == "__main__":
    sys.exit(main())
