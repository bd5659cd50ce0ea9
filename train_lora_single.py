"""Train a LoRA adapter for Qwen3.5-4B on conversations, on one GPU.

    python train_lora_single.py              # data/train.jsonl -> output/final_lora
    python train_lora_single.py --dry_run    # only check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       # the same code on a tiny model with random weights
    python train_lora_single.py --lora_r 16 --lora_alpha 32    # each constant is a flag too

LoRA leaves a weight W (d x k) frozen and learns A (r x k) and B (d x r) beside it:
y = W x + (alpha / r) B A x. README.md says what a run prints, writes and needs.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import re
import reprlib
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import textwrap
import time
import traceback
import typing
import warnings
from pathlib import Path

if typing.TYPE_CHECKING:  # the libraries are imported where they are used, after the data has been checked
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from trl import SFTTrainer

# ---- constants: edit them here, or give the flag of the same name in lower case -------------------------------------

# Model: on the hub or in a folder, with a text-only class in transformers and layers that have LORA_TARGET_MODULES.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # hub name, or a folder with safetensors; loaded without its vision tower
MODEL_REVISION = "main"  # branch, tag or commit on the hub; a commit makes the run repeatable
DEVICE = "cuda"  # "cuda", or "cpu" for a model of up to a billion parameters
DTYPE = "bfloat16"  # of the frozen weights: "bfloat16", or "float32" for twice their memory; LoRA's are float32

# Data: one JSON object a line, {"prompt": [messages], "completion": [reply]} or {"messages": [messages]}.
TRAIN_FILE = "data/train.jsonl"  # what is learnt; JSONL, see README.md
EVAL_FILE = "data/eval.jsonl"  # held out, to see overfitting: about a tenth; "" turns evaluation and samples off
MAX_SEQ_LEN = 512  # tokens; longer examples are left out. The memory of the activations grows with it

# LoRA.
LORA_R = 8  # rank: 4 for a narrow task, 8 for about 1,000 examples of a style, 16+ for complex behaviour, more data
LORA_ALPHA = 16  # alpha / r scales the update like a step size: 2 is usual, much more oscillates, less may not learn
LORA_DROPOUT = 0.05  # on the LoRA branch only; against learning repeated phrases by heart
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj",  # attention (what is looked at), FFN (words, rhythm)
                       "gate_proj", "up_proj", "down_proj"]  # q and v alone train too, with less effect  # fmt: skip

# Training. Steps = ceil(examples / (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS)) x NUM_EPOCHS.
NUM_EPOCHS = 3  # passes over the training file; fewer if the eval loss turns up
BATCH_SIZE = 2  # examples at once on the GPU; out of memory: lower this first, then MAX_SEQ_LEN
GRADIENT_ACCUMULATION_STEPS = 2  # batches per optimizer step; raise it as BATCH_SIZE falls, to keep the product
LEARNING_RATE = 2e-4  # the peak; lower it if the loss jumps
LR_SCHEDULER_TYPE = "cosine"  # after the warm-up: "cosine", "linear" or "constant_with_warmup"
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises from 0
SEED = 42  # of A's first values, dropout and the order of the examples

# Output.
OUTPUT_DIR = "output"  # all results go here
LOGGING_STEPS = 10  # steps between two printed losses; each is that of its step alone
SAVE_STEPS = 50  # steps between two checkpoints, which a kill loses at most; the two newest and each epoch's are kept
RESUME = "auto"  # "auto" goes on from an interrupted run's newest checkpoint, "never" starts anew and keeps the old
NUM_SAMPLES = 5  # held-out prompts answered by base and adapter in samples.md; 0 for none
MAX_NEW_TOKENS = 200  # of a sample reply; a longer one is marked as cut
REPORT_TO = "none"  # tracker, installed apart: "tensorboard", "trackio", "wandb", "mlflow"

# What --demo changes. In float32, since a CPU without bf16 is slow in it.
DEMO = {"model_name": "tests/tiny-qwen3.5", "output_dir": "output/demo", "device": "cpu", "dtype": "float32",
        "num_epochs": 1, "learning_rate": 1e-2}  # fmt: skip

# What vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the constants as changed by --demo and the flags; a bad flag or value exits with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--dry_run] [--CONSTANT VALUE ...], or --help", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--demo", action="store_true", help=f"train {DEMO['model_name']}, into {DEMO['output_dir']}")
    parser.add_argument("--dry_run", action="store_true", help="stop after the plan; needs no weights and no GPU")
    comments = dict(re.findall(r"^([A-Z_]+)\b.*?# *(.+)$", Path(__file__).read_text("utf-8"), re.MULTILINE))
    constants = {n: v for n, v in globals().items() if n.isupper() and n not in ("DEMO", "VLLM_RANKS")}
    for name, value in constants.items():
        real = name in ("LEARNING_RATE", "LORA_DROPOUT", "WARMUP_RATIO")
        many = {"nargs": "+"} if name == "LORA_TARGET_MODULES" else {"type": float if real else type(value)}
        about = comments.get(name, "").replace("%", "%%") + " [%(default)s]"
        parser.add_argument(f"--{name.lower()}", default=value, metavar="VALUE", help=about, **many)
    parser.set_defaults(**(DEMO if "--demo" in argv else {}))
    args = parser.parse_args(argv)
    choices = {
        "DEVICE": ["cuda", "cpu"], "DTYPE": ["bfloat16", "float32"], "RESUME": ["auto", "never"],
        "LR_SCHEDULER_TYPE": ["cosine", "linear", "constant_with_warmup"],
        "REPORT_TO": ["none", "tensorboard", "trackio", "wandb", "mlflow"],
    }  # fmt: skip
    below = {"SEED": 2**32, "LORA_DROPOUT": 1, "WARMUP_RATIO": 1, "LORA_R": VLLM_RANKS[-1] + 1}
    for name in constants:
        value = vars(args)[name.lower()]
        if name in choices:
            good, rule = value in choices[name], " or ".join(choices[name])
        elif name == "LORA_TARGET_MODULES":
            good, rule = value and isinstance(value, list), "a list of names"
        elif isinstance(value, (int, float)):
            least = "at least 0" if name in ("SEED", "LORA_DROPOUT", "WARMUP_RATIO", "NUM_SAMPLES") else "above 0"
            good = 0 < value < below.get(name, math.inf) or (least == "at least 0" and value == 0)
            rule = f"{least} and below {below[name]}" if name in below else least
        else:
            good, rule = value or name == "EVAL_FILE", "given"
        if not good:
            parser.error(f"--{name.lower()} {value}: must be {rule}")
    tracker = importlib.util.find_spec(args.report_to) if args.report_to != "none" else None
    if args.report_to != "none" and not (tracker and tracker.origin):  # a mere folder of that name has no origin
        parser.error(f"--report_to {args.report_to}: not installed; pip install {args.report_to}, or leave it none")
    if args.eval_file == args.train_file:
        parser.error(f"--eval_file {args.eval_file}: is the training file; hold out other conversations, or none")
    return args


def launched(name: str, alone: int = 0) -> int:
    """Return what a launcher says in RANK, LOCAL_RANK, WORLD_SIZE or LOCAL_WORLD_SIZE; alone if there is none."""
    return int(os.environ.get(name, alone)) if "LOCAL_RANK" in os.environ else alone


def say(section: str, text: str) -> None:
    """Print text with the section's name to the left of its first line."""
    print(f"{section:<9}" + text.replace("\n", "\n" + " " * 9), flush=True)


def first(items: list[str], limit: int = 20, separator: str = "\n") -> str:
    """Join the first items, and say how many more there are."""
    return separator.join(items[:limit] + [f"... and {len(items) - limit:,} more"] * (len(items) > limit))


def parse_line(text: str) -> tuple[list[dict], set[str]]:
    """Return a line's examples, one for each reply to be learnt, and its unused keys; or raise ValueError.

    {"prompt": [...], "completion": [reply]} is one example, {"messages": [...]} one for each assistant message. In the
    example {"messages": [...], "reply": n, "prompt": hash} messages[n] is learnt, after messages[:n].
    """

    def refuse(constant: str) -> typing.NoReturn:
        raise ValueError(f"{constant} is not JSON; write a string or a number")

    def unique(pairs: list[tuple]) -> dict:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("an object has a key twice, of which one would be lost; remove it")
        return dict(pairs)

    row = json.loads(text, parse_constant=refuse, parse_int=float, object_pairs_hook=unique)
    form = [key for key in ("messages", "prompt", "completion") if isinstance(row, dict) and key in row]
    if form not in (["messages"], ["prompt", "completion"]):
        found = " and ".join(form) or f"no conversation: {reprlib.repr(row)}"
        raise ValueError(f"has {found}; write an object with either messages, or prompt and completion")
    order = {"messages": ("s?(ua)+", "assistant last"), "prompt": ("s?u(au)*", "user last")}  # by the first letters
    order["completion"] = ("a", "here one assistant message")
    for key in form:
        roles = []
        for number, message in enumerate(row[key] if isinstance(row[key], list) else [], 1):
            match message:
                case {"role": "system" | "user" | "assistant" as role, "content": str(content)}:
                    good = len(message) == 2 and content.strip() and not re.search("[\ud800-\udfff]", content)
                case _:
                    good = False
            if not good:
                rule = "role (system, user or assistant), content (text, not blank, no lone surrogate), nothing else"
                raise ValueError(f"{key} message {number} is {reprlib.repr(message)}; write {rule}")
            roles.append(role)
        if not re.fullmatch(order[key][0], "".join(role[0] for role in roles)):
            rule = f"a list of messages, at most one system, then user and assistant in turn, {order[key][1]}"
            raise ValueError(f"{key} is {first(roles, 6, ', ') or reprlib.repr(row[key])}; write {rule}")
    turns = row["messages"] if form == ["messages"] else row["prompt"] + row["completion"]
    examples, prompt = [], 0
    for n, turn in enumerate(turns):
        if turn["role"] == "assistant":
            examples.append({"messages": turns, "reply": n, "prompt": prompt})
        prompt = hash((prompt, turn["role"], turn["content"]))
    return examples if form == ["messages"] else examples[-1:], row.keys() - form


def read_examples(path: str) -> list[dict]:
    """Return a JSONL file's examples as parse_line makes them, with "where": "path:line"; exit with all bad lines."""
    examples, problems, unused = [], [], set()
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # it is read twice, which a pipe cannot
            raise OSError(0, "a directory or a pipe, not a file")
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
                    found, others = parse_line(text) if text else ([], set())
                    examples += [{"where": f"{path}:{number}", **example} for example in found]
                    unused |= others
                    continue
                except json.JSONDecodeError as error:
                    fault = f"not JSON at column {error.colno}, {error.msg}; one object a line"
                except UnicodeDecodeError as error:
                    fault = f"not UTF-8 at byte {error.start + 1}; save the file as UTF-8"
                except RecursionError:
                    fault = "nested too deeply; write an object with a list of messages"
                except ValueError as error:
                    fault = str(error)
                problems.append(f"{path}:{number}: {fault}" if len(problems) < 20 else "")  # 20 are shown
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; set TRAIN_FILE and EVAL_FILE to JSONL files") from None
    if problems or not examples:
        raise SystemExit(first(problems) or f"{path}: no examples; write one JSON object a line")
    keys = "; keys not used: " * bool(unused) + first([ascii(key)[1:-1] for key in sorted(unused)], 6, ", ")
    say("data", f"{path}: {len(examples):,} example{'s' * (len(examples) > 1)}{keys}")
    return examples


def warn_of_repeats(train: list[dict], evaluation: list[dict]) -> None:
    """Print the lines that repeat an example of their file, and the eval prompts that are also trained on."""
    notes, prompts = {}, {example["prompt"]: example["where"] for example in reversed(train)}
    for examples in (train, evaluation):
        seen = {}
        for example in examples:
            prompt, where, reply = example["prompt"], example["where"], example["messages"][example["reply"]]
            if (before := seen.setdefault((prompt, reply["content"]), where)) != where:
                notes[f"{where} repeats {before}"] = None
            elif examples is evaluation and prompt in prompts:
                notes[f"{where} has the prompt of {prompts[prompt]}; it tests nothing new"] = None
    if notes:
        say("warning", first([*notes]))


def check_device(args: argparse.Namespace) -> str:
    """Return a line about the device, or exit if it cannot train. To be called before transformers is imported."""
    import torch

    # A call of PEFT's, not the user's.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    fla_advice = logging.getLogger("transformers.integrations.hub_kernels")  # to install fla, which needs sm_80
    if args.device == "cpu":
        fla_advice.setLevel("ERROR")
        return "CPU"
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise SystemExit("DEVICE cuda: the launcher asks for mixed precision; give it --mixed_precision no")
    # Where NVML answers, device_count() does not start CUDA, so CUDA_VISIBLE_DEVICES still takes effect after it.
    several = torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ
    if several:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not torch.cuda.is_available():
        advice = "try --demo, or --dry_run, or --device cpu with a small MODEL_NAME"
        raise SystemExit(f"DEVICE cuda: torch sees no GPU; {advice}")
    if (asked := launched("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count():
        raise SystemExit(f"DEVICE cuda: {asked} processes, {torch.cuda.device_count()} GPUs; lower --num_processes")
    torch.cuda.set_device(launched("LOCAL_RANK"))
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    try:
        ones = torch.ones(8, 8, dtype=torch.bfloat16, device="cuda")
        (ones @ ones).sum().item()
    except torch.OutOfMemoryError:
        raise SystemExit(f"DEVICE cuda: the memory of {name} is full; nvidia-smi shows by what") from None
    except RuntimeError as error:  # a wheel without this GPU's kernels says so only here; is_available() is True
        advice = 'pip install "torch>=2.7,<2.11", whose newest wheels reach from sm_70 (V100) to sm_120'
        fault = f"this torch does not run on {name}, sm_{major}{minor} ({str(error).splitlines()[0]})"
        raise SystemExit(f"DEVICE cuda: {fault}; {advice}") from None
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) or not header.exists():
        raise SystemExit(f"DEVICE cuda: TRL compiles its loss when first used; install gcc and Python's {header}")
    if major < 8:
        # Neither supports these GPUs, but transformers takes fla wherever it can be imported. Its own code is correct.
        sys.modules["fla"] = sys.modules["causal_conv1d"] = None
        fla_advice.setLevel("ERROR")
    bf16 = "native" if major >= 8 else "emulated, slower than fp32; DeltaNet runs without fla, which needs sm_80"
    memory = f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"
    note = "\nof several visible GPUs only the first is used" * several
    return f"{name}, sm_{major}{minor}, {memory}; this torch has its kernels\nbf16 is {bf16}{note}"


def load_config_and_tokenizer(args: argparse.Namespace) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Return MODEL_NAME's (config, tokenizer), or exit with one message if there is no such model."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import httpx
    from transformers import AutoConfig, AutoTokenizer

    name, where = args.model_name, {"revision": args.model_revision, "trust_remote_code": False}
    local = Path(name).is_dir()
    try:
        # One request first: from_pretrained alone spends 25 s on retries before it says that there is no network.
        if not local and not try_to_load_from_cache(name, "config.json", revision=args.model_revision):
            HfApi().model_info(name, revision=args.model_revision, timeout=10)
        config, tokenizer = AutoConfig.from_pretrained(name, **where), AutoTokenizer.from_pretrained(name, **where)
    except (httpx.HTTPError, OSError, ValueError) as error:
        fault = "a broken folder" if local else "no folder here, and not to be had from the hub"
        reason = textwrap.shorten(str(error), 300)
        raise SystemExit(f"MODEL_NAME {name}: {fault}; check name and network, or try --demo ({reason})") from None
    cached = None if local else try_to_load_from_cache(name, "config.json", revision=args.model_revision)
    if isinstance(cached, str):  # a branch moves: from here on it is the commit that was read
        args.model_revision = Path(cached).parent.name
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise SystemExit(f"MODEL_NAME {name}: no chat template or no end-of-turn token; use a model made for chat")
    return config, tokenizer


def encode(examples: list[dict], tokenizer: PreTrainedTokenizerBase, max_seq_len: int) -> list[dict]:
    """Tokenize examples as a server with enable_thinking=false would; return those of at most max_seq_len tokens.

    To each it adds input_ids (prompt, reply, end-of-turn token) and labels (-100 on the prompt). The ids before a
    reply are those that a server makes, in every turn. Longer examples are left out by name: cut, they would teach the
    model not to stop. Exits if over a tenth are, if a text holds a control token, if training would not equal serving.
    """
    from jinja2 import TemplateError

    serving, eos = {"enable_thinking": False, "return_dict": False}, tokenizer.eos_token_id
    control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    rows, too_long, problems = [], [], []
    shared = {}  # each token id once: an int of its own for each token would take 28 bytes
    for example in examples:
        where, conversation = example["where"], example["messages"][: example["reply"] + 1]
        if found := [token for token in control for message in conversation if token in message["content"]]:
            problems.append(f"{where}: the text holds the control token {found[0]}; respell or remove it")
            continue
        try:
            prompt = tokenizer.apply_chat_template(conversation[:-1], add_generation_prompt=True, **serving)
            whole = tokenizer.apply_chat_template(conversation, **serving)
        except TemplateError as error:
            problems.append(f"{where}: the chat template refuses it ({error}); change the conversation")
            continue
        reply = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or eos not in reply:
            fault = f"its prompt is rendered otherwise before the reply, or the reply lacks {tokenizer.eos_token}"
            problems.append(f"{where}: {fault}; training would not equal serving. Is there a think tag?")
            continue
        prompt = [shared.setdefault(i, i) for i in prompt]
        reply = [shared.setdefault(i, i) for i in reply[: reply.index(eos) + 1]]
        row = {**example, "input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
        (rows if len(row["input_ids"]) <= max_seq_len else too_long).append(row)
    notes = [f"{row['where']}: {len(row['input_ids']):,} tokens, over MAX_SEQ_LEN {max_seq_len}" for row in too_long]
    if len(too_long) > len(examples) / 10:
        longest = max(len(row["input_ids"]) for row in too_long)
        advice = f"over a tenth; shorten them, or raise MAX_SEQ_LEN to {longest:,}"
        problems = [f"{len(too_long):,} of {len(examples):,} examples are too long, {advice}", *notes]
    if problems:
        raise SystemExit(first(problems))
    if notes:
        say("left out", first(notes))
    return rows


def report_tokens(
    files: dict[str, tuple[list[dict], list[dict]]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict]:
    """Print the lengths of each file's rows, and the first row with its trained part marked; return hash and counts.

    files holds (examples read, rows encoded) for each path.
    """
    facts = {}
    table = f"{'file':<24}{'examples':>9}{'min':>6}{'median':>8}{'p95':>6}{'max':>6}{'tokens':>11}{'trained':>18}"
    for path, (examples, rows) in files.items():
        n = sorted(len(row["input_ids"]) for row in rows)
        trained, p95 = sum(n) - sum(row["labels"].count(-100) for row in rows), n[math.ceil(0.95 * len(n)) - 1]
        table += f"\n{path:<24}{len(n):>9,}{n[0]:>6,}{statistics.median(n):>8,.0f}{p95:>6,}{n[-1]:>6,}{sum(n):>11,}"
        table += f"{f'{trained:,} ({trained / sum(n):.0%})':>18}"
        data = Path(path).read_bytes()
        facts[path] = {
            "sha256": hashlib.sha256(data).hexdigest(), "lines": data.count(b"\n") + (data[-1:] != b"\n"),
            "examples": len(n), "left_out": len(examples) - len(n), "tokens": sum(n), "trained_tokens": trained,
        }  # fmt: skip
    row = next(iter(files.values()))[1][0]
    start = row["labels"].count(-100)
    text = f"{tokenizer.decode(row['input_ids'][:start])}>>>{tokenizer.decode(row['input_ids'][start:])}<<<"
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)  # a terminal obeys some
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 90) or [""]]
    say("tokens", table)
    say("example", "\n".join([f"{row['where']} as the model sees it; only what stands in >>> <<< is trained", *lines]))
    return facts


def make_plan(args: argparse.Namespace, config: PreTrainedConfig, n_train: int) -> dict[str, int]:
    """Print what will be trained and return its counts, from the config alone: the model is built without weights.

    PEFT gives each linear module whose name is a target an A (r x k) and a B (d x r) beside its W (d x k): r (d + k)
    parameters. A target that matches nothing is an error here; PEFT says nothing as long as another one matches.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    linear = {}  # (name, parent, d, k) of a linear module: the layers that have it
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (at := re.search(r"\.(\d+)\.(?:.+\.)?(\w+)\.(\w+)$", path)):
            linear.setdefault((at[3], at[2], module.out_features, module.in_features), set()).add(int(at[1]))
    targets, names = list(dict.fromkeys(args.lora_target_modules)), sorted({name for name, *_ in linear})
    if unknown := [target for target in targets if target not in names]:
        near = [name for target in unknown for name in difflib.get_close_matches(target, names, n=1)]
        meant = f"did you mean {', '.join(near)}? " * bool(near)
        raise SystemExit(
            f"LORA_TARGET_MODULES: no layer has {', '.join(unknown)}; {meant}The layers have {', '.join(names)}"
        )
    text, r, scale, trainable = config.get_text_config(), args.lora_r, args.lora_alpha / args.lora_r, 0
    table = f"{'target':<12}{'in layers':<17}{'W (frozen)':>14}{'A':>11}{'B':>11}{'parameters':>14}"
    for target in targets:
        for (_, parent, d, k), layers in [item for item in linear.items() if item[0][0] == target]:
            trainable += (count := len(layers) * r * (d + k))
            kind = {"self_attn": "attention", "mlp": "FFN"}.get(parent, parent)
            table += f"\n{target:<12}{f'{len(layers)}/{text.num_hidden_layers} {kind}':<17}"
            table += f"{f'{d}x{k}':>14}{f'{r}x{k}':>11}{f'{d}x{r}':>11}{count:>14,}"
    total = trainable + sum(parameter.numel() for parameter in model.parameters())
    shape = [args.batch_size, args.gradient_accumulation_steps]
    if launched("WORLD_SIZE", 1) > 1:
        shape.append(launched("WORLD_SIZE"))
    per_epoch = math.ceil(n_train / math.prod(shape))
    plan = {"trainable": trainable, "total": total, "per_epoch": per_epoch, "steps": per_epoch * args.num_epochs}
    plan["max_lora_rank"] = min(rank for rank in VLLM_RANKS if rank >= r)
    say("plan", f"r={r} alpha={args.lora_alpha}, scale alpha/r = {scale:g}, dropout {args.lora_dropout:g}\n{table}")
    say("", f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    deltanet = {i for i, kind in enumerate(text.to_dict().get("layer_types") or []) if kind == "linear_attention"}
    absent = [t for t in targets if not any(deltanet & layers for key, layers in linear.items() if key[0] == t)]
    if deltanet and absent:
        say("", f"{len(deltanet)} of {text.num_hidden_layers} layers are Gated DeltaNet, without {', '.join(absent)}:")
        say("", f"in them LoRA adapts only {', '.join(t for t in targets if t not in absent) or 'nothing'}")
    batch = " x ".join(map(str, shape))
    say("", f"{plan['steps']:,} steps, {per_epoch:,} an epoch: ceil({n_train:,} / ({batch})) x {args.num_epochs}")
    # Twice the adapter, then the adapter and AdamW's two moments a checkpoint (each epoch's, the two newest, the one
    # being written), and a tokenizer of up to 25 MB in each.
    plan["disk"] = trainable * (8 + 12 * (args.num_epochs + 3)) + 25_000_000 * (args.num_epochs + 5)
    files = f"{4 * trainable / 1e6:.1f} MB, with the checkpoints at most {plan['disk'] / 1e6:,.0f} MB of disk"
    say("", f"adapter file {files}\nvLLM needs --max-lora-rank {plan['max_lora_rank']} for r={r}")
    return plan


def check_room(args: argparse.Namespace, plan: dict[str, int], checkpoint: Path | None = None) -> None:
    """Exit if the model is too large for a CPU, or the disk too full for a run from its beginning."""
    if args.device == "cpu" and plan["total"] > 1e9:
        advice = "use a GPU or a smaller MODEL_NAME"
        raise SystemExit(f"DEVICE cpu: {plan['total']:,} parameters, over a billion; {advice}")
    free = shutil.disk_usage(args.output_dir).free
    if free < plan["disk"] and not checkpoint:  # the checkpoints of a run that goes on are there already
        found = f"{free / 1e6:,.0f} MB free, {plan['disk'] / 1e6:,.0f} MB needed"
        raise SystemExit(f"OUTPUT_DIR {args.output_dir}: {found}; make room")


def is_write_error(error: BaseException) -> bool:
    """Return whether error is what Python, safetensors, torch or tokenizers raise when a file cannot be written."""
    from safetensors import SafetensorError

    of_torch = isinstance(error, RuntimeError) and "inline_container" in str(error)
    return isinstance(error, (OSError, SafetensorError)) or of_torch or type(error) is Exception  # tokenizers' own


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a checkpoint but complete.json, which holds them."""
    files = sorted(path for path in folder.iterdir() if path.name != "complete.json")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def find_checkpoint(args: argparse.Namespace, files: dict[str, dict]) -> Path | None:
    """Return the newest complete checkpoint of this very job, or move aside what an earlier one left and return None.

    What makes it this job is written to checkpoints/job.json, which a finished run removes. Exits if it differs.
    """
    from accelerate import PartialState

    folder, names, complete = Path(args.output_dir, "checkpoints"), [*vars(args)], {}
    # What stands above OUTPUT_DIR changes the result, but for the device and the files' places.
    names = names[names.index("model_name") : names.index("output_dir")]
    job = {name.upper(): vars(args)[name] for name in names if name != "device"}
    job["PROCESSES"] = launched("WORLD_SIZE", 1)
    job |= {name: file["sha256"][:16] for name, file in zip(("TRAIN_FILE", "EVAL_FILE"), files.values(), strict=False)}
    for path in folder.glob("checkpoint-*/complete.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # complete.json itself may be cut
            if json.loads(path.read_text(encoding="utf-8")).items() <= hashes(path.parent).items():
                complete[int(path.parent.name.split("-")[1])] = path.parent
    if complete and args.resume == "auto" and (folder / "job.json").exists():
        newest, old = complete[max(complete)], json.loads((folder / "job.json").read_text(encoding="utf-8"))
        differ = [name for name in old | job if old.get(name) != job.get(name)]
        if not differ:
            say("resume", f"from {newest}, {max(complete):,} steps are done; --resume never starts anew")
            return newest
        rows = [f"  {name:<28} {old.get(name)!s:<20} {job.get(name)}" for name in differ]
        table = "\n".join([f"  {'':<28} {newest.name:<20} now", *rows])
        advice = "set these back to go on with it, or give --resume never to start anew and keep it under a time stamp"
        raise SystemExit(f"OUTPUT_DIR {args.output_dir} holds an interrupted run of another job:\n{table}\n{advice}")
    PartialState(cpu=args.device == "cpu").wait_for_everyone()  # before the first moves what the others look at
    if not launched("RANK"):
        set_aside(folder)
        set_aside(folder.with_name("run.json"))
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    return None


def load_model(args: argparse.Namespace) -> PreTrainedModel:
    """Return MODEL_NAME's text model in DTYPE, or exit if its weights are not whole safetensors files."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            args.model_name, revision=args.model_revision, dtype=args.dtype,
            trust_remote_code=False, use_safetensors=True,  # no code and no pickle from the hub
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        fault = f"no weights ({textwrap.shorten(str(error), 300)}); they must be whole safetensors files"
        raise SystemExit(f"MODEL_NAME {args.model_name}: {fault}") from None


def build_trainer(
    args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, train: list[dict], evaluation: list[dict],
    resume: bool = False,
) -> SFTTrainer:  # fmt: skip
    """Return the SFTTrainer over the frozen model in DTYPE, with LoRA injected by the trainer and by nothing else."""
    import trl.trainer.utils
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
    from trl import SFTConfig, SFTTrainer

    def dataset(rows: list[dict]) -> Dataset:
        return Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in rows])

    batch = args.batch_size * args.gradient_accumulation_steps * launched("WORLD_SIZE", 1)
    lora_config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=args.lora_target_modules, revision=args.model_revision,
    )  # fmt: skip
    sft_config = SFTConfig(
        output_dir=f"{args.output_dir}/checkpoints", seed=args.seed, report_to=args.report_to,
        num_train_epochs=args.num_epochs, per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        per_device_eval_batch_size=4 * args.batch_size,  # no activations are kept for a backward pass
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=int(args.warmup_ratio * args.num_epochs * math.ceil(len(train) / batch)),
        # No autocast: the frozen products in DTYPE, LoRA's in float32. TRL turns bf16 on by itself. With autocast the
        # error of LoRA's gradients against float32 is about the same: SmolLM2-135M 4.2 % with, 4.4 without; 2.9 with,
        # 2.7 without on four random layers of Qwen3.5-4B (tests/benchmark.py precision, on a CPU).
        bf16=False, fp16=False, ddp_find_unused_parameters=False,
        activation_checkpointing=False,  # of all batches alike; keep_activations() chooses for each
        # The rows are tokenized: TRL must not render, cut or pack them. Packed, DeltaNet without fla would carry its
        # state from one conversation into the next.
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False,
        eval_strategy="epoch" if evaluation else "no",
        eval_on_start=bool(evaluation) and not resume,  # B is zero then, so this is the base model's loss
        save_steps=args.save_steps,
        logging_steps=1,  # each step's loss is checked and kept; LOGGING_STEPS says which are printed
        logging_nan_inf_filter=False,  # True puts a mean in the place of a NaN loss
        eos_token=tokenizer.eos_token,  # so that model and tokenizer agree on where a turn ends
        use_cpu=args.device == "cpu", disable_tqdm=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=load_model(args),
        peft_config=lora_config,  # LoRA is injected here and nowhere else
        args=sft_config,
        train_dataset=dataset(train),
        eval_dataset=dataset(sorted(evaluation, key=lambda row: len(row["input_ids"]))) if evaluation else None,
        processing_class=tokenizer,
    )
    # Batches of like lengths need less padding. transformers' group_by_length draws from the global random state, so a
    # run resumed from a checkpoint would go another way; this sampler draws from the seed and the epoch.
    lengths = [len(row["input_ids"]) for row in train]
    sampler = DistributedLengthGroupedSampler(batch, num_replicas=1, rank=0, seed=args.seed, lengths=lengths)
    trainer._get_train_sampler = lambda dataset=None: sampler
    if args.device == "cpu":
        trl.trainer.utils._use_triton = lambda device: True  # score only trained positions, as TRL does on a GPU
    return trainer


def check_injection(model: PeftModel, plan: dict[str, int]) -> None:
    """Print PEFT's count; exit unless it is the plan's, and LoRA's weights, in float32, are all that is trainable."""
    print(f"{'model':<9}", end="")
    model.print_trainable_parameters()
    counts, planned = model.get_nb_trainable_parameters(), (plan["trainable"], plan["total"])
    trained = {name: str(p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    odd = trained.keys() ^ {name for name, _ in model.named_parameters() if "lora_" in name}
    odd |= {f"{name} in {dtype}" for name, dtype in trained.items() if dtype != "torch.float32"}
    if odd or counts != planned:
        found = f"{counts[0]:,} of {counts[1]:,} parameters are trainable, not {planned[0]:,} of {planned[1]:,}"
        raise SystemExit(first([f"LoRA is not injected as planned; nothing is trained. {found}", *sorted(odd)]))
    say("", "LoRA is injected as planned: its weights are float32 and trainable, all others frozen")


def keep_activations(trainer: SFTTrainer, rows: list[dict], args: argparse.Namespace) -> None:
    """Recompute activations in the backward pass only for the batches whose activations do not fit the GPU's memory.

    Recomputing costs about 45 % more work. Simulated for 2 x 512 tokens of Qwen3.5-4B: 8.8 GiB with, 23.1 without
    (tests/benchmark.py flops memory); not measured on a V100. Which fit is tried out, the longest batch first; exits
    if that does not fit in either way.
    """
    import torch
    from transformers import set_seed
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, limit, rows = trainer.model, math.inf, sorted(rows, key=lambda row: len(row["input_ids"]))
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # torch's non-reentrant recomputation needs no gradient of the embeddings
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    batches = [rows[n : n + args.batch_size] for n in range(max(1, len(rows) - args.batch_size + 1))]

    def recompute_if_large(_: PeftModel, __: tuple, inputs: dict) -> None:
        for layer in layers:
            layer.gradient_checkpointing = inputs["input_ids"].numel() > limit

    def overflows(batch: list[dict]) -> bool:
        inputs = trainer._prepare_inputs(trainer.data_collator(batch))
        try:  # the passes of a training step, without its metrics: of several processes only one may overflow
            model(**inputs, fused_lm_head=True).loss.backward()
        except torch.OutOfMemoryError:
            return True
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()
        return False

    def tokens(batch: list[dict]) -> int:
        return len(batch) * len(batch[-1]["input_ids"])

    model.register_forward_pre_hook(recompute_if_large, with_kwargs=True)
    if args.device == "cpu":
        return
    torch.cuda.set_per_process_memory_fraction(0.9)  # a tenth for the optimizer's state and for memory in pieces
    model.train()
    if overflows(batches[-1]):
        fit = bisect.bisect_left(batches, True, key=overflows)
        limit = tokens(batches[fit - 1]) if fit else 0
        if overflows(batches[-1]):
            advice = "lower BATCH_SIZE and raise GRADIENT_ACCUMULATION_STEPS, or lower MAX_SEQ_LEN"
            raise SystemExit(f"memory: a batch of {tokens(batches[-1]):,} tokens does not fit this GPU; {advice}")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.reset_peak_memory_stats()
    set_seed(args.seed)
    kept = {math.inf: "kept for all batches", 0: "recomputed for all batches"}
    say("memory", f"activations are {kept.get(limit, f'kept for batches of up to {limit:,} tokens, else recomputed')}")


def watch(trainer: SFTTrainer, args: argparse.Namespace, plan: dict[str, int], record: dict, stop: list[int]) -> None:
    """Have trainer print its losses, exit at one that is not finite, stop at a signal, and save whole checkpoints."""
    import torch
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, _, state, control, logs=None, **kwargs):
            record["loss_history"] = state.log_history
            for key in ("loss", "grad_norm", "eval_loss"):
                if not math.isfinite(logs.get(key, 0)):
                    advice = "lower LEARNING_RATE or set DTYPE to float32, and start anew with --resume never"
                    raise SystemExit(f"train: {key} is {logs[key]} at step {state.global_step}; no adapter; {advice}")
            if self.training_bar and "eval_loss" in logs:
                self.training_bar.write(f"{'eval':<9}epoch {state.epoch or 0:g}  loss {logs['eval_loss']:.4f}")
            elif self.training_bar and "loss" in logs and state.global_step % args.logging_steps == 0:
                line = f"{'train':<9}step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.4f}  "
                line += f"gradient norm {logs['grad_norm']:.3f}  learning rate {logs['learning_rate']:.2e}"
                self.training_bar.write(line)

        def on_prediction_step(self, arguments, state, control, **kwargs):
            super().on_prediction_step(arguments, state, control, **kwargs)
            if stop and not state.global_step:  # the evaluation before the first step
                raise KeyboardInterrupt(stop[0], "stopped before the first step; there is nothing to keep")

        def on_step_end(self, arguments, state, control, **kwargs):
            super().on_step_end(arguments, state, control, **kwargs)
            if trainer.accelerator.reduce(torch.tensor(len(stop), device=arguments.device)) and not stop:
                stop.append(signal.SIGTERM)  # another process was told to stop: all do, after the same step
            # An epoch's last step is saved after its evaluation, since that moves the random state.
            control.should_save = bool(control.should_save or stop) and state.global_step % plan["per_epoch"] != 0
            control.should_training_stop |= bool(stop)

        def on_epoch_end(self, arguments, state, control, **kwargs):
            control.should_save = state.global_step % plan["per_epoch"] == 0
            control.should_evaluate &= control.should_save

    save, folder = trainer._save_checkpoint, Path(trainer.args.output_dir)

    def save_whole(*parameters: typing.Any) -> None:
        try:
            save(*parameters)
            trainer.accelerator.wait_for_everyone()
            if launched("RANK"):
                return
            new = folder / f"checkpoint-{trainer.state.global_step}"
            (new / "complete.json").write_text(json.dumps(hashes(new)), encoding="utf-8")
            steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
            for step in (step for step in steps[:-2] if step % plan["per_epoch"]):
                shutil.rmtree(folder / f"checkpoint-{step}")
        except Exception as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(folder / f"checkpoint-{trainer.state.global_step}", ignore_errors=True)
            fault = f"checkpoint {trainer.state.global_step} could not be written ({error})"
            advice = "make room, and the same command goes on from the newest complete one"
            raise SystemExit(f"OUTPUT_DIR {args.output_dir}: {fault}; {advice}") from None

    trainer._save_checkpoint = save_whole
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)


def train(
    trainer: SFTTrainer, args: argparse.Namespace, plan: dict[str, int], record: dict, checkpoint: Path | None = None
) -> None:
    """Train to the end, from checkpoint if there is one, and put time, peak memory and losses into record.

    After SIGINT or SIGTERM it finishes the step, saves a checkpoint and raises KeyboardInterrupt(signal, message).
    """
    import torch

    stop = []

    def on_signal(number: int, _: typing.Any) -> None:
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)  # the same signal again ends the process at once
        os.write(2, b"\nstopping: this step is finished and saved first; once more stops at once\n")

    watch(trainer, args, plan, record, stop)
    before = {one: signal.signal(one, on_signal) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except torch.OutOfMemoryError:
        advice = "lower BATCH_SIZE and raise GRADIENT_ACCUMULATION_STEPS, then lower MAX_SEQ_LEN"
        raise SystemExit(f"train: out of GPU memory at step {trainer.state.global_step}; {advice}") from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 1024 * resource.getrusage(0).ru_maxrss
    record["train_runtime"], record["peak_memory_gib"] = trainer.state.log_history[-1]["train_runtime"], peak / 2**30
    if stop:
        step, folder = trainer.state.global_step, trainer.args.output_dir
        goes_on = f"the same command goes on from {folder}/checkpoint-{step}"
        raise KeyboardInterrupt(stop[0], f"stopped at step {step:,} of {plan['steps']:,}; {goes_on}")


def save_adapter(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, folder: Path,
    args: argparse.Namespace,
) -> None:  # fmt: skip
    """Write folder/final_lora, and final_lora_vllm if needed; exit unless the config says what the constants say."""
    from safetensors.torch import load_file, save_file

    final, vllm, prefix = folder / "final_lora", folder / "final_lora_vllm", "base_model.model.model."
    model.save_pretrained(final, save_embedding_layers=False)
    tokenizer.save_pretrained(final)
    saved = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    saved["target_modules"] = sorted(saved["target_modules"])
    wanted = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout, "bias": "none"}
    wanted |= {"task_type": "CAUSAL_LM", "target_modules": sorted({*args.lora_target_modules})}
    if wrong := [f"{key} is {saved[key]}, not {value}" for key, value in wanted.items() if saved[key] != value]:
        raise SystemExit(f"{final}/adapter_config.json does not say what the constants say: {'; '.join(wrong)}")
    tensors = load_file(final / "adapter_model.safetensors")
    if config.get_text_config() is not config and all(name.startswith(f"{prefix}layers.") for name in tensors):
        # A wrapper's modules vLLM finds under language_model. Up to 0.32 it accepts other names, and serves the base.
        vllm.mkdir()
        shutil.copy(final / "adapter_config.json", vllm)
        renamed = {name.replace(prefix, f"{prefix}language_model.", 1): tensor for name, tensor in tensors.items()}
        save_file(renamed, vllm / "adapter_model.safetensors", {"format": "pt"})


def prove(model: PeftModel, folder: Path, row: dict) -> PeftModel:
    """Return the base with folder's adapter loaded from disk; exit unless that adapter is the trained one and works.

    Its tensors must equal those of model, the trained PeftModel, which gives up its adapter here. On row's tokens its
    logits must equal the trained model's (to a tenth of its effect, as a GPU may round otherwise), and not the base's.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    kept, saved = get_peft_model_state_dict(model), load_file(folder / "adapter_model.safetensors")
    odd = [name for name in kept.keys() | saved.keys()
           if name not in kept or name not in saved or not torch.equal(kept[name].cpu(), saved[name])]  # fmt: skip
    odd += [name for name, t in saved.items() if not t.isfinite().all() or ("lora_B" in name and not t.any())]
    if odd:
        named = first(sorted({*odd}), 3, ", ")
        raise SystemExit(f"proof: in {folder} not as trained, not finite or all zero: {named}")
    ids = torch.tensor([row["input_ids"]], device=model.device)
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        reloaded = PeftModel.from_pretrained(model.unload(), folder)
        error = (reloaded(input_ids=ids).logits - trained).abs().max().item()
        with reloaded.disable_adapter():
            effect = (reloaded(input_ids=ids).logits - trained).abs().max().item()
    found = f"reloaded from disk, its logits differ by {error:.2g} from the trained model's"
    found += f", by {effect:.2g} from the base's"
    if not (effect > 0 and error <= effect / 10):
        raise SystemExit(f"proof: {folder}: {found}; the adapter does not work, and is not kept")
    say("proof", found)
    return reloaded


def write_samples(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict], path: Path, args: argparse.Namespace
) -> None:
    """Write held-out conversations with the base's, the adapter's and the written reply to path; greedy decoding."""
    import torch

    def answer(batch: list[dict]) -> list[str]:
        prompts = [row["input_ids"][: row["labels"].count(-100)] for row in batch]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "use_cache": True}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        with torch.no_grad():
            ids = model.generate(**inputs, **greedy, **ends, max_new_tokens=args.max_new_tokens)
        replies = ids[:, inputs["input_ids"].shape[1] :]
        cut = [" [cut here]" * (tokenizer.eos_token_id not in reply) for reply in replies.tolist()]
        return [tokenizer.decode(r, skip_special_tokens=True) + note for r, note in zip(replies, cut, strict=True)]

    count = min(args.num_samples, len(rows))
    rows = [rows[i * len(rows) // count] for i in range(count)]
    text = f"# Replies with and without the adapter\n\n{args.model_name}, r={args.lora_r}, alpha={args.lora_alpha}, "
    text += f"NUM_EPOCHS {args.num_epochs}, {args.train_file}.\nHeld-out prompts as a server with "
    text += f"enable_thinking=false sends them, greedy decoding, at most {args.max_new_tokens} tokens.\n"
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        adapted = answer(batch)
        with model.disable_adapter():
            base = answer(batch)
        for row, without, with_it in zip(batch, base, adapted, strict=True):
            *prompt, written = row["messages"][: row["reply"] + 1]
            text += f"\n## {row['where']}\n"
            said = [(message["role"], message["content"]) for message in prompt]
            for who, reply in [*said, ("base", without), ("adapter", with_it), ("written", written["content"])]:
                text += f"\n**{who}**\n\n" + "".join(f"> {line}\n" for line in re.split(r"\r\n?|\n", reply.strip()))
    path.write_text(text, encoding="utf-8")
    say("samples", f"{len(rows)} held-out prompts answered with and without the adapter")


def draw_losses(history: list[dict], path: Path, title: str, per_epoch: int) -> None:
    """Draw train loss, raw and smoothed, eval loss and learning rate over the steps to a PNG at path."""
    os.environ.pop("MPLBACKEND", None)  # nothing is shown on a screen, and an unknown name is an error
    from matplotlib.figure import Figure

    trained = [entry for entry in history if "loss" in entry]
    steps, losses, rates = ([entry[key] for entry in trained] for key in ("step", "loss", "learning_rate"))
    evals = [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    width = max(1, len(losses) // 25)
    smooth = [statistics.fmean(losses[max(0, i - width) : i + width + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    top.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8, label="train, each step")
    top.plot(steps, smooth, color="tab:blue", label=f"train, mean of {2 * width + 1} steps")
    if evals:
        top.plot(*zip(*evals, strict=True), "o-", color="tab:orange", label="eval")
        for step, loss in evals:
            above = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center"}
            white = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}
            top.annotate(f"{loss:.2f}", (step, loss), bbox=white, **above)
    bottom.plot(steps, rates, color="tab:green")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        for step in range(per_epoch, steps[-1] + 1, per_epoch):
            axes.axvline(step, color="gray", linestyle=":", linewidth=1)
    top.set_title(title, parse_math=False)
    top.set(ylabel="loss, nats per token")
    bottom.set(xlabel="step (dotted: end of an epoch)", ylabel="learning rate")
    top.legend(frameon=False)
    figure.savefig(path)


def write_card(folder: Path, args: argparse.Namespace, system: str | None) -> str:
    """Write how to use folder/final_lora into its model card, below PEFT's head; return the command for vLLM.

    r is read from the saved adapter_config.json. system is the system message of the training conversations.
    """
    final, output = folder / "final_lora", Path(args.output_dir)
    lora = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    rank = min(rank for rank in VLLM_RANKS if rank >= lora["r"])
    served = output / ("final_lora_vllm" if (folder / "final_lora_vllm").exists() else "final_lora")
    command = f"""vllm serve {shlex.quote(args.model_name)} --revision {shlex.quote(args.model_revision)} \\
  --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(f"companion={served}")} \\
  --default-chat-template-kwargs '{{"enable_thinking": false}}'"""
    messages = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": "Good morning."}]
    request = shlex.quote(json.dumps({"model": "companion", "messages": messages}, ensure_ascii=False))
    head = (final / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    text = f"""---\n{head}---

# LoRA adapter for {args.model_name}

r={lora["r"]}, alpha={lora["lora_alpha"]}, on {", ".join(sorted(lora["target_modules"]))}.
It was trained behind the prompt that `enable_thinking=false` makes: keep that setting. Paths are as seen from where it
was trained.

## vLLM

```
{command}
```

`--max-lora-rank` is the smallest value that vLLM takes for r={lora["r"]}. Qwen3.5 needs vLLM 0.17 or newer; its wheels
hold kernels for the V100 (sm_70) up to 0.19. Where there is a `final_lora_vllm`, serve that: up to 0.32 vLLM accepts
the names in `final_lora`, says nothing, and answers as the base model.

```
curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d {request}
```

## Python

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({str(output / "final_lora")!r})
model = AutoModelForCausalLM.from_pretrained({args.model_name!r}, revision={args.model_revision!r}, dtype="auto")
model = PeftModel.from_pretrained(model, {str(output / "final_lora")!r}).eval()
messages = {messages!r}
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, enable_thinking=False, return_dict=True, return_tensors="pt"
)
reply = model.generate(**inputs, max_new_tokens={args.max_new_tokens}, eos_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(reply[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
    (final / "README.md").write_text(text, encoding="utf-8")
    return command


def set_aside(path: Path) -> None:
    """Rename what an earlier run left at path, if anything, so that its time stamp ends its name."""
    if path.exists():
        aside = f"{path}.{time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))}"
        while os.path.exists(aside):
            aside += "+"
        path.rename(aside)
        say("moved", f"{path} of an earlier run to {aside}")


def write_results(
    trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, train: list[dict],
    evaluation: list[dict], args: argparse.Namespace, plan: dict[str, int],
) -> str:  # fmt: skip
    """Write and prove all results in OUTPUT_DIR/partial, then move them in; return the command that serves them.

    What an earlier run left is set aside at the very end, so that a full disk or a failed proof leaves it in place.
    """
    output_dir, partial = Path(args.output_dir), Path(args.output_dir, "partial")
    system = next((m["content"] for m in train[0]["messages"] if m["role"] == "system"), None)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        save_adapter(trainer.model, tokenizer, config, partial, args)
        model = prove(trainer.model, partial / "final_lora", (evaluation or train)[0])
        if evaluation and args.num_samples:
            write_samples(model, tokenizer, evaluation, partial / "samples.md", args)
        model_name, data = ("/".join(Path(name).parts[-2:]) for name in (args.model_name, args.train_file))
        title = f"{model_name}, r={args.lora_r}, alpha={args.lora_alpha}, {data}"
        draw_losses(trainer.state.log_history, partial / "loss.png", title, plan["per_epoch"])
        command = write_card(partial, args, system)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_write_error(error):
            raise
        advice = "what earlier runs left is as it was. Make room and run the same command again: no step is repeated"
        raise SystemExit(f"OUTPUT_DIR {args.output_dir}: the results cannot be written ({error}); {advice}") from None
    for name in ("final_lora", "final_lora_vllm", "samples.md", "loss.png"):
        set_aside(output_dir / name)
    for new in partial.iterdir():
        new.rename(output_dir / new.name)
    partial.rmdir()
    (output_dir / "checkpoints" / "job.json").unlink()
    return command


def describe_run(args: argparse.Namespace, plan: dict[str, int], files: dict[str, dict], device: str) -> dict:
    """Return what run.json says at the start: the constants, code, packages, data, device."""
    git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    driver = Path("/proc/driver/nvidia/version")
    packages = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "matplotlib"]
    constants = {name.upper(): value for name, value in vars(args).items() if name not in ("demo", "dry_run")}
    return {
        "outcome": "running", "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "constants": constants,
        "git_commit": commit.removesuffix("-dirty") or None, "git_dirty": commit.endswith("-dirty"),
        "python": sys.version.split()[0], "versions": {name: importlib.metadata.version(name) for name in packages},
        "device": device, "driver": driver.read_text().split("\n")[0] if driver.exists() else None,
        "data": files, "plan": plan,
    }  # fmt: skip


def write_record(args: argparse.Namespace, record: dict) -> None:
    """Write run.json as a whole, if record holds a run that has started and this is the first process."""
    if "started" not in record or launched("RANK"):
        return
    new = Path(args.output_dir, "run.json.new")
    strict = json.loads(json.dumps(record), parse_constant=str)  # NaN is not JSON
    try:
        new.write_text(json.dumps(strict, indent=1), encoding="utf-8")
        new.replace(new.with_suffix(""))
    except OSError as error:
        say("warning", f"{args.output_dir}/run.json cannot be written: {error.strerror}")


def summarize(args: argparse.Namespace, plan: dict[str, int], record: dict, started: float, command: str) -> None:
    """Print where the results are, what the run did, whether it overfitted, and how to serve the adapter."""
    output_dir, evals = Path(args.output_dir), [e for e in record["loss_history"] if "eval_loss" in e]
    size = (output_dir / "final_lora" / "adapter_model.safetensors").stat().st_size / 1e6
    say("done", f"adapter    {output_dir}/final_lora, {size:.1f} MB")
    share = 100 * plan["trainable"] / plan["total"]
    say("", f"trained    {plan['trainable']:,} of {plan['total']:,} parameters, {share:.4f} %")
    losses = [f"{entry['eval_loss']:.4f}" for entry in evals] or ["not evaluated"]
    say("", f"eval loss  {' -> '.join(losses)}")
    if evals and (best := min(evals, key=lambda e: e["eval_loss"]))["eval_loss"] < evals[-1]["eval_loss"]:
        where = f"{output_dir}/checkpoints/checkpoint-{best['step']}" if best["step"] else "the base model as it was"
        say("", f"overfit    lowest after epoch {best['epoch'] or 0:g}: {where}; lower NUM_EPOCHS or LEARNING_RATE")
    minutes, memory = record["train_runtime"] / 60, record["peak_memory_gib"]
    since = " since the checkpoint" * bool(record["resumed_from"])
    say("", f"time       {minutes:.1f} min of training{since}, {(time.time() - started) / 60:.1f} min in all")
    say("", f"memory     {memory:.1f} GiB at the peak{' of the process' * (args.device == 'cpu')}")
    shown = [name for name in ("samples.md", "loss.png", "run.json") if (output_dir / name).exists()]
    say("", f"look at    {', '.join(f'{output_dir}/{name}' for name in shown)}")
    if args.demo:
        say("", "The demo's weights are random: it shows that the job runs, not that replies get better.")
    say("next", f"{command}\n{output_dir}/final_lora/README.md has this, a request and the lines of Python")


class _Tee:
    """A stream that copies to a log what is not a progress bar; bars begin at the start of their line again."""

    def __init__(self, stream: typing.TextIO, log: typing.TextIO) -> None:
        self.stream, self.log, self.bar = stream, log, False

    def write(self, text: str) -> int:
        self.bar = text.startswith(("\r", "\x1b")) or (self.bar and not text.strip())
        if not (self.bar or self.log.closed):
            with contextlib.suppress(OSError):  # a full disk must not hide the message that says so
                self.log.write(text)
        return self.stream.write(text)

    def __getattr__(self, name: str) -> typing.Any:
        return getattr(self.stream, name)


def run(args: argparse.Namespace, record: dict) -> None:
    """Do the job, a section a call; fill record, which main() writes to run.json."""
    started = time.time()
    examples, held_out = read_examples(args.train_file), read_examples(args.eval_file) if args.eval_file else []
    warn_of_repeats(examples, held_out)
    device = None if args.dry_run else check_device(args)
    config, tokenizer = load_config_and_tokenizer(args)
    train_rows = encode(examples, tokenizer, args.max_seq_len)
    eval_rows = encode(held_out, tokenizer, args.max_seq_len)
    files = {args.train_file: (examples, train_rows)} | ({args.eval_file: (held_out, eval_rows)} if eval_rows else {})
    facts = report_tokens(files, tokenizer)
    plan = make_plan(args, config, len(train_rows))
    if args.dry_run:
        return
    say("device", device)
    checkpoint = find_checkpoint(args, facts)
    check_room(args, plan, checkpoint)
    record.update(describe_run(args, plan, facts, device), resumed_from=checkpoint and str(checkpoint))
    write_record(args, record)
    trainer = build_trainer(args, tokenizer, train_rows, eval_rows, bool(checkpoint))
    check_injection(trainer.model, plan)
    keep_activations(trainer, train_rows, args)
    train(trainer, args, plan, record, checkpoint)
    trainer.end()
    if launched("RANK"):
        return
    command = write_results(trainer, tokenizer, config, train_rows, eval_rows, args, plan)
    evals = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    record["eval_loss"] = {"before": evals[0], "after": evals[-1]} if evals else None
    summarize(args, plan, record, started, command)


def main(argv: list[str] | None = None) -> None:
    """Run the job with the constants as changed by flags, and copy what is printed to OUTPUT_DIR/all_logs.log."""
    args = parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL would tell the hub of each run
    keeps_log = not (args.dry_run or launched("RANK"))
    try:
        if keeps_log:
            os.makedirs(args.output_dir, exist_ok=True)
        log = open(f"{args.output_dir}/all_logs.log" if keeps_log else os.devnull, "a", 1, "utf-8")  # noqa: SIM115
        if keeps_log:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        words = shlex.join(sys.argv if argv is None else argv)
        log.write(f"\n---- {time.strftime('%Y-%m-%d %H:%M:%S')} {words}\n")
    except OSError as error:
        fault = "another run writes there" if isinstance(error, BlockingIOError) else error.strerror
        raise SystemExit(f"OUTPUT_DIR {args.output_dir}: {fault}; choose a folder to write in") from None

    def interrupt(number: int, _: typing.Any) -> typing.NoReturn:
        raise KeyboardInterrupt(number, "stopped; the same command goes on from the newest checkpoint, if any")

    handlers = {one: signal.signal(one, interrupt) for one in (signal.SIGINT, signal.SIGTERM)}
    # Of several processes only the first one speaks.
    out, err = (log, log) if launched("RANK") else (sys.stdout, sys.stderr)
    constants = {name: value for name, value in vars(args).items() if name not in ("demo", "dry_run")}
    changed = {name.upper(): value for name, value in constants.items() if value != globals()[name.upper()]}
    record, status = {"changed_by_flags": changed}, 0
    with log, contextlib.redirect_stdout(_Tee(out, log)), contextlib.redirect_stderr(_Tee(err, log)):
        try:
            run(args, record)
            record["outcome"] = "finished"
        except SystemExit as stop:
            message, status, record["outcome"] = stop, 1, f"failed: {stop}"
        except KeyboardInterrupt as stop:
            for one in handlers:  # another signal must not break off what is left to do
                signal.signal(one, signal.SIG_IGN)
            number, message = stop.args if len(stop.args) == 2 else (signal.SIGINT, "stopped")  # a library's own
            status, record["outcome"] = 128 + number, f"interrupted: {message}"
        except BaseException as error:
            record["outcome"] = f"failed: {error!r}"
            traceback.print_exc(file=log)
            raise
        finally:
            write_record(args, record)
            for one, handler in handlers.items():
                signal.signal(one, handler)
        if status and launched("RANK"):
            # The first process fails alike and says it, and then the launcher ends this one. If not, this one speaks.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20 if status == 1 and "loss_history" not in record else 0)
            if status == 1:
                print(message, file=sys.__stderr__)
        elif status:
            print(message, file=sys.stderr)
        if status:
            raise SystemExit(status)


if __name__ == "__main__":
    main()
