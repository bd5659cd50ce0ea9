"""Train a LoRA adapter for Qwen3.5-4B on conversations, on one GPU.

    python train_lora_single.py              # data/train.jsonl -> output/final_lora
    python train_lora_single.py --dry_run    # only check the data and print the plan; needs no GPU
    python train_lora_single.py --demo       # the same code on a tiny model with random weights
    python train_lora_single.py --lora_r 16 --lora_alpha 32    # each constant is a flag too

LoRA leaves a weight W (d x k) frozen and learns A (r x k) and B (d x r) beside it:
y = W x + (alpha / r) B A x. run(), at the end, is the table of contents.
"""

import argparse
import bisect
import contextlib
import datetime
import difflib
import fcntl
import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036
    raise SystemExit("Python 3.11, 3.12 or 3.13 is needed; README.md says how to get one")

# torch and what builds on it are imported where they are used: a bad line is reported before.

# ==== 1 Constants: edit them here, or give the flag of the same name in lower case

# Model.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # on the hub, or a folder; loaded without its vision tower
MODEL_REVISION = "main"  # branch, tag or commit on the hub
DEVICE = "cuda"  # "cuda", or "cpu", for a small model
DTYPE = "bfloat16"  # of the frozen weights; "float32" takes twice the memory

# Data: lines of {"prompt": [...], "completion": [...]} or {"messages": [...]}.
TRAIN_FILE = "data/train.jsonl"  # what is learnt
EVAL_FILE = "data/eval.jsonl"  # held out, about a tenth; "" turns evaluation and samples off
MAX_SEQ_LEN = 512  # tokens; longer examples are left out. More needs more memory

# LoRA.
LORA_R = 8  # rank: 4 for a narrow task, 8 for a style and 1,000 examples, 16+ for more
LORA_ALPHA = 16  # alpha / r scales the update: 2 is usual, more may oscillate, less not learn
LORA_DROPOUT = 0.05  # on the LoRA branch only; against learning phrases by heart
LORA_TARGET_MODULES = [  # or DeltaNet's in_proj_qkv, in_proj_z, out_proj
    "q_proj", "k_proj", "v_proj", "o_proj",  # attention: what is looked at
    "gate_proj", "up_proj", "down_proj",  # feed-forward: words and rhythm
]  # fmt: skip

# Training. Steps = ceil(examples / (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS)) x NUM_EPOCHS
NUM_EPOCHS = 3  # passes over the training file; fewer if the eval loss turns up
BATCH_SIZE = 2  # examples at once on the GPU; lower this first when memory is short
GRADIENT_ACCUMULATION_STEPS = 2  # batches a step; raise it as BATCH_SIZE falls
LEARNING_RATE = 2e-4  # the peak; lower it if the loss jumps
LR_SCHEDULER_TYPE = "cosine"  # after the warm-up: "cosine", "linear", "constant_with_warmup"
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises from 0
SEED = 42  # of A's first values, dropout and the order of the examples

# Output.
OUTPUT_DIR = "output"  # all results go here
LOGGING_STEPS = 10  # steps between two printed losses
SAVE_STEPS = 50  # steps between two checkpoints, which a kill loses at most
RESUME = "auto"  # "auto" goes on from an interrupted run, "never" starts anew
NUM_SAMPLES = 5  # held-out prompts answered by base and adapter in samples.md; 0 for none
MAX_NEW_TOKENS = 200  # of a sample reply, else it is cut

# What --demo changes.
DEMO = {
    "MODEL_NAME": "tests/tiny-qwen3.5", "OUTPUT_DIR": "output/demo", "DEVICE": "cpu",
    "DTYPE": "float32", "NUM_EPOCHS": 1, "LEARNING_RATE": 1e-2,
}  # fmt: skip

# ==== 2 Command line: a flag for each constant, and report()

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank takes
# Type, then the texts allowed, or the least value and the first too large. A checkpoint goes on
# only with the same values of these:
JOB_RULES = {
    "MODEL_NAME": (str,), "MODEL_REVISION": (str,), "DTYPE": (str, "bfloat16", "float32"),
    "MAX_SEQ_LEN": (int, 1), "LORA_R": (int, 1, VLLM_RANKS[-1] + 1), "LORA_ALPHA": (int, 1),
    "LORA_DROPOUT": (float, 0, 1), "LORA_TARGET_MODULES": (list,), "NUM_EPOCHS": (int, 1),
    "BATCH_SIZE": (int, 1), "GRADIENT_ACCUMULATION_STEPS": (int, 1),
    "LEARNING_RATE": (float, 1e-9, 1), "WARMUP_RATIO": (float, 0, 1), "SEED": (int, 0, 2**32),
    "LR_SCHEDULER_TYPE": (str, "cosine", "linear", "constant_with_warmup"),
}  # fmt: skip
RULES = JOB_RULES | {
    "DEVICE": (str, "cuda", "cpu"), "TRAIN_FILE": (str,), "EVAL_FILE": (str,),
    "OUTPUT_DIR": (str,), "LOGGING_STEPS": (int, 1), "SAVE_STEPS": (int, 1),
    "RESUME": (str, "auto", "never"), "NUM_SAMPLES": (int, 0), "MAX_NEW_TOKENS": (int, 1),
}  # fmt: skip
LOG = logging.getLogger("train_lora_single")


def is_first_process():
    """Return whether this is the only process, or the first."""
    return os.environ.get("RANK", "0") == "0" or "MASTER_ADDR" not in os.environ


def report(section, text):
    """Print and log text, with the section's name to its left."""
    if is_first_process():
        lines = f"{section:<9}" + text.replace("\n", "\n" + " " * 9)
        print(lines, flush=True)
        LOG.info(lines)


def brief(value, width=200):
    """Return value as one line, cut to width."""
    return textwrap.shorten(str(value), width, placeholder=" ...")


def listed(items, limit=20, separator="\n"):
    """Join the first items, and count the others."""
    more = [f"... and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join(items[:limit] + more)


def check_constant(name, value):
    """Raise ValueError unless value is as RULES says."""
    kind, *allowed = RULES[name]
    good = type(value) is kind or (kind is float and type(value) is int)
    if kind is str:
        rule = " or ".join(map(repr, allowed)) or "a text, not empty"
        good = good and value.isprintable()
        good = good and (value in allowed if allowed else value or name == "EVAL_FILE")
    elif kind is list:
        rule = "a list of names, in quotes"
        good = good and value and all(isinstance(item, str) and item for item in value)
    else:
        least, below, *_ = *allowed, math.inf
        rule = f"{kind.__name__}, at least {least} and below {below}"
        good = good and least <= value < below
    if not good:
        raise ValueError(f"{name} is {value!r}; it must be {rule}")


def parse_args(argv=None):
    """Return the constants as changed by --demo and the flags; exit with 2 if one is bad."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--demo] [--dry_run] [--CONSTANT VALUE ...]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--demo", action="store_true", help="a tiny model, into output/demo")
    parser.add_argument("--dry_run", action="store_true", help="stop after the plan; needs no GPU")
    source = Path(__file__).read_text("utf-8")
    comments = dict(re.findall(r"^([A-Z_]+) = .*?# *(.+)$", source, re.MULTILINE))
    is_demo = "--demo" in (sys.argv if argv is None else argv)
    try:
        constants = {name: globals()[name] for name in RULES} | (DEMO if is_demo else {})
        for name, value in constants.items():
            check_constant(name, value)
            kind, comment = RULES[name][0], comments.get(name, "").replace("%", "%%")
            about = {"default": value, "metavar": "VALUE", "help": f"{comment} [%(default)s]"}
            about |= {"nargs": "+"} if kind is list else {"type": kind}
            parser.add_argument(f"--{name.lower()}", **about)
        args = parser.parse_args(argv)
        for name in constants:
            check_constant(name, vars(args)[name.lower()])
    except (KeyError, ValueError) as error:
        parser.error(str(error))
    if args.eval_file == args.train_file:
        parser.error(f"EVAL_FILE {args.eval_file}: is the training file; hold out others")
    return args


# ==== 3 Data: read, check every line, find repeats

ROLE_ORDER = {  # the roles in a list of messages, by their first letters
    "messages": ("s?(ua)+", "at most one system, then user and assistant in turn"),
    "prompt": ("s?u(au)*", "at most one system, then user and assistant in turn, user last"),
    "completion": ("a", "one assistant message"),
}
OTHER_FORMS = {"conversations": "ShareGPT's", "instruction": "Alpaca's"}


def check_messages(key, messages):
    """Raise ValueError unless a row's list of messages is well-formed."""
    roles = []
    for number, message in enumerate(messages if isinstance(messages, list) else [], 1):
        whole = isinstance(message, dict) and message.keys() == {"role", "content"}
        role, text = (message["role"], message["content"]) if whole else ("", "")
        is_text = isinstance(text, str) and text.strip() and not re.search("[\ud800-\udfff]", text)
        if role not in ("system", "user", "assistant") or not is_text:
            rule = "role (system, user, assistant) and content (text, not blank, no lone surrogate)"
            found = f"{key} message {number} is {brief(repr(message), 80)}"
            raise ValueError(f"{found}; write only {rule}")
        roles.append(role)
    pattern, rule = ROLE_ORDER[key]
    if not re.fullmatch(pattern, "".join(role[0] for role in roles)):
        found = listed(roles, 6, ", ") or brief(repr(messages), 80)
        raise ValueError(f"{key} is {found}; write a list of messages, {rule}")


def without_repeats(pairs):
    """Return a JSON object as a dictionary, or raise ValueError."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an object has a key twice, of which one would be lost; remove it")
    return dict(pairs)


def parse_line(text):
    """Return a line's examples, of which message number "reply" is learnt, and its unused keys."""
    row = json.loads(text, object_pairs_hook=without_repeats)
    keys = row.keys() if isinstance(row, dict) else set()
    form = [key for key in ROLE_ORDER if key in keys]
    if form not in (["messages"], ["prompt", "completion"]):
        found = " and ".join(form) or f"no conversation: {brief(repr(row), 80)}"
        for key in OTHER_FORMS.keys() & keys:
            found = f"{OTHER_FORMS[key]} form; README.md has the lines that turn it"
        raise ValueError(f"has {found}; write an object with messages, or prompt and completion")
    for key in form:
        check_messages(key, row[key])
    turns = row["messages"] if form == ["messages"] else row["prompt"] + row["completion"]
    examples, prompt_hash = [], 0
    for n, turn in enumerate(turns):
        if turn["role"] == "assistant":
            examples.append({"messages": turns, "reply": n, "prompt_hash": prompt_hash})
        prompt_hash = hash((prompt_hash, turn["role"], turn["content"]))
    return examples if form == ["messages"] else examples[-1:], keys - form


def read_examples(path):
    """Return a file's examples, with "where": "path:line"; exit with all bad lines."""
    examples, problems, unused = [], [], set()
    try:
        if Path(path).is_fifo():
            raise OSError(0, "a pipe, which cannot be read twice")
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; set TRAIN_FILE and EVAL_FILE to JSONL files")
    for number, line in enumerate(lines, 1):
        try:
            text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
            found, others = parse_line(text) if text else ([], set())
            examples += [{"where": f"{path}:{number}", **example} for example in found]
            unused |= others
            continue
        except json.JSONDecodeError as error:
            fault = f"not JSON at column {error.colno}, {error.msg}; write one object a line"
        except UnicodeDecodeError as error:
            fault = f"{error}; save the file as UTF-8"
        except (ValueError, RecursionError) as error:
            fault = error
        problems.append(f"{path}:{number}: {fault}")
    if problems or not examples:
        raise SystemExit(listed(problems) or f"{path}: no examples; write one JSON object a line")
    names = listed([ascii(key)[1:-1] for key in sorted(unused)], 6, ", ")
    note = f"; keys not used: {names}" if names else ""
    report("data", f"{path}: {len(examples):,} example{'s' * (len(examples) > 1)}{note}")
    return examples


def warn_of_repeats(train, held_out):
    """Print the lines that repeat others, and held-out prompts trained on."""
    notes, seen, trained = {}, {}, {row["prompt_hash"]: row["where"] for row in reversed(train)}
    for row in train + held_out:
        prompt, reply = row["prompt_hash"], row["messages"][row["reply"]]["content"]
        before = seen.setdefault((prompt, reply), row["where"])
        if before != row["where"]:
            notes[f"{row['where']} repeats {before}"] = None
    for row in held_out:
        if same := trained.get(row["prompt_hash"]):
            notes[f"{row['where']} has the prompt of {same}; it tests nothing new"] = None
    if notes:
        report("warning", listed([*notes]))


# ==== 4 Device, model: the processes, the GPU, config and tokenizer


def join_processes(args):
    """Return the number of processes, after meeting the others."""
    from accelerate import PartialState

    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"]
    *numbers, address = [os.environ.get(name, "") for name in names]
    if not any(numbers[:3]):
        return 1
    unset = f"if none were launched: unset {' '.join(names)}"
    if not address or not all(number.isdigit() for number in numbers):
        raise SystemExit(f"{', '.join(names)} are {[*numbers, address]}, not all set; {unset}")
    report("waiting", f"5 minutes for {numbers[2]} processes at {address}; {unset}")
    # The wait is in C++, where Python's handlers do not run.
    before = {one: signal.signal(one, signal.SIG_DFL) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        PartialState(cpu=args.device == "cpu", timeout=datetime.timedelta(minutes=5))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"the processes did not meet ({brief(error)}); {unset}")
    for one, handler in before.items():
        signal.signal(one, handler)
    return PartialState().num_processes


def why_no_gpu():
    """Return why torch finds no GPU, the driver's version, and what would help."""
    import torch

    reason = ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = re.split(r"\.\s", str(error))[0]
    proc = Path("/proc/driver/nvidia/version")
    driver = re.search(r" (\d+)\.[\d.]+ ", proc.read_text()) if proc.exists() else None
    found = f"driver {driver[0].strip()}" if driver else "no NVIDIA driver is loaded"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        found += f", CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
    cuda, advice = str(torch.version.cuda), "try --demo, or --dry_run, or --device cpu"
    oldest = {"11": 450, "12": 525, "13": 580}.get(cuda.split(".")[0], 0)  # CUDA's release notes
    if driver and int(driver[1]) < oldest:
        advice = f"torch for CUDA {cuda} needs driver {oldest} or newer: update it, or install"
        advice += " torch 2.7.1 for CUDA 11.8, which needs 450"
    return f"torch sees no GPU ({reason}); {found}; {advice}"


def set_up_loss(device, dtype):
    """Have TRL score only trained positions, without Triton, which needs a compiler; try it."""
    import torch
    import trl.kernels.chunked_logprob as kernel
    import trl.trainer.utils

    # Private names: a test fails when they have no effect.
    trl.trainer.utils._use_triton = lambda device: True  # only trained positions
    kernel._use_triton = lambda device: False  # but not by Triton
    ones = functools.partial(torch.ones, device=device, dtype=getattr(torch, dtype))
    hidden, targets = ones(4, 8, requires_grad=True), torch.zeros(4, device=device).long()
    loss = kernel.ChunkedLogProbFunction.apply(hidden, ones(16, 8), None, targets, 1.0, 8)[0]
    loss.sum().backward()
    hidden.grad.sum().item()


def check_device(args):
    """Return a line about the device, or exit; call it before transformers is imported."""
    import torch

    if args.device == "cpu":
        set_up_loss("cpu", args.dtype)
        return "CPU"
    # Of several GPUs the first; device_count() does not start CUDA yet.
    if torch.cuda.device_count() > 1 and "LOCAL_RANK" not in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]
    if not torch.cuda.is_available():
        raise SystemExit(f"DEVICE cuda: {why_no_gpu()}")
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    if major < 8:  # fla does not support it, but transformers takes fla wherever it is installed
        sys.modules["fla"] = sys.modules["causal_conv1d"] = None
    try:
        torch.ones(1, device="cuda").sum().item()
        set_up_loss("cuda", args.dtype)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a wheel without this GPU's kernels says so only here
        advice = 'pip install "torch>=2.7,<2.11", for sm_70 (V100) to sm_120, or try float32'
        raise SystemExit(f"DEVICE cuda: torch does not run on {name} ({brief(error)}); {advice}")
    bf16 = "native" if major >= 8 else "emulated; DeltaNet runs without fla, which needs sm_80"
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    return f"{name}, {free:.1f} of {total:.1f} GiB free; bf16 is {bf16}"


def load_config_and_tokenizer(args):
    """Return MODEL_NAME's (config, tokenizer), or exit; a branch becomes its commit."""
    from huggingface_hub import resolve_revision
    from transformers import AutoConfig, AutoTokenizer

    name, is_folder = args.model_name, Path(args.model_name).is_dir()
    fault = "a broken folder" if is_folder else "no folder here, and not to be had from the hub"
    try:
        if not is_folder:  # one request: from_pretrained alone retries for 25 s
            args.model_revision = resolve_revision(name, revision=args.model_revision).resolved
        chosen = {"revision": args.model_revision, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **chosen)
        tokenizer = AutoTokenizer.from_pretrained(name, **chosen)
    except Exception as error:  # the hub's, the network's, a file's
        advice = "check the name and the network, or try --demo"
        raise SystemExit(f"MODEL_NAME {name}: {fault} ({brief(error)}); {advice}")
    if not tokenizer.chat_template or tokenizer.eos_token_id is None or len(tokenizer) < 256:
        fault = "no tokenizer, chat template or end-of-turn token; use a model made for chat"
        raise SystemExit(f"MODEL_NAME {name}: {fault}")
    if "quantization_config" in config.to_dict() | config.get_text_config().to_dict():
        raise SystemExit(f"MODEL_NAME {name}: quantized; use the model that it was made from")
    return config, tokenizer


# ==== 5 Tokens: what the model sees, and what of it is learnt


def render(example, tokenizer):
    """Return the token ids of the prompt and of the reply, or raise ValueError."""
    from jinja2 import TemplateError

    conversation = example["messages"][: example["reply"] + 1]
    for token in [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]:
        if any(token in message["content"] for message in conversation):
            raise ValueError(f"the text holds the control token {token}; respell or remove it")
    serving = {"enable_thinking": False, "return_dict": False}  # as served
    to_ids = functools.partial(tokenizer.apply_chat_template, **serving)
    try:
        prompt, whole = to_ids(conversation[:-1], add_generation_prompt=True), to_ids(conversation)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it ({error}); change the conversation")
    reply, end = whole[len(prompt) :], tokenizer.eos_token_id
    if whole[: len(prompt)] != prompt or end not in reply:
        fault = f"rendered otherwise with its reply, or without {tokenizer.eos_token}"
        raise ValueError(f"{fault}: training would not equal serving. Is there a think tag?")
    return prompt, reply[: reply.index(end) + 1]


def encode(examples, tokenizer, max_seq_len):
    """Return the examples with input_ids and labels (-100 on the prompt), but for too long ones.

    Those are left out by name: cut, they would teach the model not to stop.
    """
    rows, problems, too_long, said = [], [], [], time.monotonic()
    for number, example in enumerate(examples):
        if time.monotonic() > said + 10:
            said = time.monotonic()
            report("tokens", f"{number:,} of {len(examples):,} examples are rendered")
        try:
            prompt, reply = render(example, tokenizer)
        except ValueError as error:
            problems.append(f"{example['where']}: {error}")
            continue
        row = {**example, "input_ids": prompt + reply, "labels": [-100] * len(prompt) + reply}
        if len(row["input_ids"]) <= max_seq_len:
            rows.append(row)
        else:
            too_long.append(f"{row['where']}: {len(row['input_ids']):,} tokens, over MAX_SEQ_LEN")
    if len(too_long) > len(examples) / 10:
        fault = f"{len(too_long):,} of {len(examples):,} examples are over MAX_SEQ_LEN"
        problems += [f"{fault} {max_seq_len}, over a tenth; shorten them, or raise it", *too_long]
    if problems:
        raise SystemExit(listed(problems))
    if too_long:
        report("left out", listed(too_long))
    return rows


def report_tokens(files):
    """Print the lengths in tokens of {path: rows}; return hashes and counts."""
    columns, facts = "{:<24}{:>9}{:>6}{:>8}{:>6}{:>6}{:>11}{:>18}".format, {}
    lines = [columns("file", "examples", "min", "median", "p95", "max", "tokens", "trained")]
    for path, rows in files.items():
        n = sorted(len(row["input_ids"]) for row in rows)
        tokens, p95 = sum(n), n[math.ceil(0.95 * len(n)) - 1]
        trained = tokens - sum(row["labels"].count(-100) for row in rows)
        numbers = (len(n), n[0], round(statistics.median(n)), p95, n[-1], tokens)
        share = f"{trained:,} ({trained / tokens:.0%})"
        lines.append(columns(path, *(f"{number:,}" for number in numbers), share))
        facts[path] = {
            "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(), "examples": len(n),
            "tokens": tokens, "trained_tokens": trained,
        }  # fmt: skip
    report("tokens", "\n".join(lines))
    return facts


def show_example(row, tokenizer):
    """Print a row as the model sees it."""
    ids, start = row["input_ids"], row["labels"].count(-100)
    text = f"{tokenizer.decode(ids[:start])}>>>{tokenizer.decode(ids[start:])}<<<"
    # A terminal obeys some of these.
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 90) or [""]]
    title = f"{row['where']} as the model sees it; only what stands in >>> <<< is trained"
    report("example", "\n".join([title, *lines]))


# ==== 6 Plan: the LoRA table, steps, disk


@dataclass
class Plan:
    """What will be trained, and what it takes."""

    trainable: int  # LoRA's parameters
    total: int  # with the base model's
    steps_per_epoch: int
    steps: int
    disk: int  # bytes at most


def linear_modules(config):
    """Return {(name, parent, d, k): layers} of the linear modules, and the number of parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    found = {}
    for path, module in model.named_modules():
        at = re.search(r"\.(\d+)\.(?:.+\.)?(\w+)\.(\w+)$", path)
        if at and isinstance(module, torch.nn.Linear):
            key = (at[3], at[2], module.out_features, module.in_features)
            found.setdefault(key, set()).add(int(at[1]))
    return found, model.num_parameters()


def check_targets(targets, names):
    """Exit if a target matches no module: PEFT says nothing as long as another one matches."""
    unknown = [target for target in targets if target not in names]
    near = {name for target in unknown for name in difflib.get_close_matches(target, names, n=1)}
    meant = f"did you mean {', '.join(sorted(near))}? " if near else ""
    have = ", ".join(names) or "no nn.Linear: another model is needed"
    if unknown:
        fault = f"no layer has {', '.join(unknown)}; {meant}the layers have {have}"
        raise SystemExit(f"LORA_TARGET_MODULES: {fault}")


def make_plan(args, config, n_train, n_processes=1):
    """Print what will be trained and return its counts, from the config alone.

    Beside W (d x k) a target gets A (r x k) and B (d x r): r (d + k) parameters.
    """
    linear, total = linear_modules(config)
    targets, text = [*dict.fromkeys(args.lora_target_modules)], config.get_text_config()
    check_targets(targets, sorted({name for name, *_ in linear}))
    r, depth, trainable = args.lora_r, text.num_hidden_layers, 0
    scale = f"scale alpha/r = {args.lora_alpha / r:g}, dropout {args.lora_dropout:g}"
    columns = "{:<12}{:<17}{:>14}{:>11}{:>11}{:>14}".format
    lines = [f"r={r} alpha={args.lora_alpha}, {scale}"]
    lines.append(columns("target", "in layers", "W (frozen)", "A", "B", "parameters"))
    for target in targets:
        for (_, parent, d, k), layers in [item for item in linear.items() if item[0][0] == target]:
            count = len(layers) * r * (d + k)
            trainable += count
            kind = {"self_attn": "attention", "mlp": "FFN"}.get(parent, parent)
            shapes = f"{d}x{k}", f"{r}x{k}", f"{d}x{r}"
            lines.append(columns(target, f"{len(layers)}/{depth} {kind}", *shapes, f"{count:,}"))
    total += trainable
    share = f"trainable%: {100 * trainable / total:.4f}"
    lines.append(f"trainable params: {trainable:,} || all params: {total:,} || {share}")
    kinds = text.to_dict().get("layer_types") or []
    deltanet = {i for i, kind in enumerate(kinds) if kind == "linear_attention"}
    there = {name for (name, *_), layers in linear.items() if deltanet & layers}
    if absent := [target for target in targets if deltanet and target not in there]:
        kept = ", ".join(target for target in targets if target in there) or "nothing"
        found = f"{len(deltanet)} of {depth} layers are Gated DeltaNet"
        lines += [f"{found}, without {', '.join(absent)}:", f"in them LoRA adapts only {kept}"]
    batch = [args.batch_size, args.gradient_accumulation_steps] + [n_processes] * (n_processes > 1)
    per_epoch = math.ceil(n_train / math.prod(batch))
    steps, product = per_epoch * args.num_epochs, " x ".join(map(str, batch))
    formula = f"ceil({n_train:,} / ({product})) x {args.num_epochs}"
    lines.append(f"{steps:,} steps, {per_epoch:,} an epoch: {formula}")
    # Bytes: adapters, three checkpoints with AdamW's two moments, five tokenizers of 25 MB.
    disk = 4 * trainable * (2 + args.num_epochs + 3 * 3) + 5 * 25_000_000
    size = f"adapter file {4 * trainable / 1e6:.1f} MB"
    lines.append(f"{size}, with the checkpoints at most {disk / 1e6:,.0f} MB of disk")
    rank = min(rank for rank in VLLM_RANKS if rank >= r)
    lines.append(f"vLLM needs --max-lora-rank {rank} for r={r}")
    report("plan", "\n".join(lines))
    return Plan(trainable, total, per_epoch, steps, disk)


# ==== 7 Run folder: what an earlier run left, the checkpoint to go on from, run.json


@dataclass
class Job:
    """What run() finds out, step by step."""

    args: argparse.Namespace
    config: object = None
    tokenizer: object = None
    train: list = field(default_factory=list)  # rows of encode()
    eval: list = field(default_factory=list)
    data: dict = field(default_factory=dict)  # of report_tokens()
    n_processes: int = 1
    device: str = ""
    plan: Plan | None = None
    checkpoint: Path | None = None  # to go on from
    facts: dict = field(default_factory=dict)  # of describe_run()
    history: list = field(default_factory=list)  # what the trainer logged
    seconds: float = 0.0  # of steps, since the checkpoint
    tokens: int = 0  # read in them
    peak_gib: float = 0.0  # of GPU memory
    is_training: bool = False
    is_published: bool = False
    stopped_by: int = 0  # a signal

    @property
    def output(self):
        """The folder of all results."""
        return Path(self.args.output_dir)


def open_log(output):
    """Lock output, and log in it what report() says, warnings and tracebacks."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(output / "all_logs.log", encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"OUTPUT_DIR {output}: {error.strerror}; choose a folder to write in")
    is_locked = True
    try:
        fcntl.flock(log.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"OUTPUT_DIR {output}: another run writes there; choose another folder")
    except OSError:  # some network file systems have no locks
        is_locked = False
    screen = logging.StreamHandler()
    screen.setLevel(logging.WARNING)
    logging.basicConfig(handlers=[log, screen], format="%(message)s", force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk must not hide the message that says so
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(sys.argv))
    if not is_locked:
        report("warning", f"{output} cannot be locked: start no second run there")


def set_aside(path):
    """Rename what an earlier run left at path, if anything."""
    if path.exists():
        aside = f"{path}.{time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))}"
        while os.path.exists(aside):
            aside += "+"
        path.rename(aside)
        report("moved", f"{path} of an earlier run to {aside}")


def write_json(path, value):
    """Write value so that path never holds half of it."""
    strict = json.loads(json.dumps(value), parse_constant=str)  # NaN is no JSON
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(strict, indent=1), encoding="utf-8")
    new.replace(path)


def hashes(folder):
    """Return the SHA-256 of each file in folder but complete.json."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name != "complete.json":
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def checkpoints_in(folder):
    """Return {step: path} of our checkpoints, in order."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    return dict(sorted((int(path.name[11:]), path) for path in found))


def is_complete(checkpoint):
    """Return whether a checkpoint's files are as written."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # complete.json may be cut too
        written = json.loads((checkpoint / "complete.json").read_text(encoding="utf-8"))
        return written.items() <= hashes(checkpoint).items()
    return False


def prune(folder, per_epoch, newest):
    """Of all checkpoints but the newest leave only each epoch's adapter."""
    saved = checkpoints_in(folder)
    for step in [*saved][: len(saved) - newest]:
        if step % per_epoch:
            shutil.rmtree(saved[step])
            continue
        for path in saved[step].iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                path.unlink()


def describe_job(job):
    """Return all that changes what is learnt."""

    def digest(value):
        return hashlib.sha256(repr(value).encode()).hexdigest()[:16]

    folder = Path(job.args.model_name)  # the hub's has a commit
    return {name: vars(job.args)[name.lower()] for name in JOB_RULES} | {
        "TRAIN_FILE's tokens": digest([(r["input_ids"], r["labels"]) for r in job.train]),
        "EVAL_FILE's tokens": digest([(r["input_ids"], r["labels"]) for r in job.eval]),
        "MODEL_NAME's files": digest(hashes(folder)) if folder.is_dir() else None,
        "processes": job.n_processes,
    }


def check_room(job):
    """Exit if the disk is too full for a run."""
    free = shutil.disk_usage(job.output).free
    if free < job.plan.disk:
        found = f"{free / 1e6:,.0f} MB free, {job.plan.disk / 1e6:,.0f} MB needed"
        raise SystemExit(f"OUTPUT_DIR {job.output}: {found}; make room")


def find_checkpoint(job):
    """Return the newest complete checkpoint of this job; exit if it is another's."""
    folder, now, before = job.output / "checkpoints", describe_job(job), None
    with contextlib.suppress(OSError, ValueError):
        before = json.loads((folder / "job.json").read_text("utf-8"))
    complete = [path for path in checkpoints_in(folder).values() if is_complete(path)]
    if before and complete and job.args.resume == "auto":
        differ = [name for name in before | now if before.get(name) != now.get(name)]
        if not differ:
            report("resume", f"from {complete[-1]}")
            return complete[-1]
        rows = [f"  {name:<28} {before.get(name)!s:<20} {now.get(name)}" for name in differ]
        raise SystemExit(f"""OUTPUT_DIR {job.output} holds an interrupted run of another job:
  {"":<28} {complete[-1].name:<20} now
{listed(rows)}
set these back to go on, choose another OUTPUT_DIR, or set it aside with --resume never""")
    check_room(job)
    if is_first_process():
        if checkpoints_in(folder):
            set_aside(folder)
        set_aside(job.output / "run.json")
        folder.mkdir(exist_ok=True)
        write_json(folder / "job.json", now)
    return None


def describe_run(job):
    """Return what run.json says from the start."""
    packages = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"]
    return {
        "started": time.time(), "constants": {n: vars(job.args)[n.lower()] for n in RULES},
        "script_sha256": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "python": sys.version, "device": job.device, "data": job.data, "plan": vars(job.plan),
        "resumed_from": job.checkpoint and str(job.checkpoint),
    }  # fmt: skip


def write_record(job, outcome):
    """Write run.json, if the run has started."""
    record = {
        "outcome": outcome, **job.facts, "train_seconds": job.seconds, "tokens": job.tokens,
        "peak_memory_gib": job.peak_gib, "loss_history": job.history,
    }  # fmt: skip
    try:
        if job.facts and is_first_process():
            write_json(job.output / "run.json", record)
    except OSError as error:
        report("warning", f"{job.output}/run.json is not written: {error.strerror}")


# ==== 8 Trainer: LoraConfig, SFTConfig, SFTTrainer; what is injected; what fits in memory


def lora_config(args):
    """Return PEFT's configuration; nothing is injected by it alone."""
    from peft import LoraConfig

    return LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules, bias="none", task_type="CAUSAL_LM",
        revision=args.model_revision,
    )  # fmt: skip


def sft_config(job):
    """Return TRL's configuration. By default: AdamW without weight decay, clipping at 1.0."""
    from trl import SFTConfig

    args = job.args
    return SFTConfig(
        output_dir=f"{job.output}/checkpoints", seed=args.seed, report_to="none",
        num_train_epochs=args.num_epochs, per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        per_device_eval_batch_size=args.batch_size,  # no larger one has been tried
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=int(args.warmup_ratio * job.plan.steps),
        # No autocast, which TRL turns on: LoRA's gradients err alike (tests/benchmark.py).
        bf16=False, fp16=False, ddp_find_unused_parameters=False,
        activation_checkpointing=False,  # fit_memory() chooses
        # TRL must not render, cut or pack the rows: packed, DeltaNet without fla would carry its
        # state from one conversation into the next.
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False,
        eval_strategy="epoch" if job.eval else "no",
        eval_on_start=bool(job.eval) and not job.checkpoint,  # B is zero then: the base's loss
        save_steps=args.save_steps, disable_tqdm=True, use_cpu=args.device == "cpu",
        logging_steps=1,  # each loss is checked and kept; LOGGING_STEPS says which are printed
        logging_nan_inf_filter=False,  # True puts a mean in the place of a NaN loss
        eos_token=job.tokenizer.eos_token,  # where a turn ends
    )  # fmt: skip


def load_model(args):
    """Return the text model in DTYPE; exit unless its files hold all its tensors."""
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            args.model_name, revision=args.model_revision, dtype=args.dtype,
            trust_remote_code=False, use_safetensors=True,  # no code, no pickle
            output_loading_info=True, ignore_mismatched_sizes=True,  # refused by name below
        )  # fmt: skip
    except Exception as error:  # as in section 4
        advice = "whole safetensors files are needed; run again to go on with a download"
        raise SystemExit(f"MODEL_NAME {args.model_name}: no weights ({brief(error)}); {advice}")
    odd = sorted(found["missing_keys"]) + sorted(key for key, *_ in found["mismatched_keys"])
    if odd:  # transformers has filled them with random numbers
        fault = f"missing in the files, or of another shape: {listed(odd, 3, ', ')}"
        raise SystemExit(f"MODEL_NAME {args.model_name}: {fault}; get whole files")
    return model


def build_trainer(job):
    """Return the SFTTrainer over the frozen model; LoRA is injected by it alone."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
    from trl import SFTTrainer

    def dataset(rows):
        return Dataset.from_list([{k: row[k] for k in ("input_ids", "labels")} for row in rows])

    args, by_length = job.args, sorted(job.eval, key=lambda row: len(row["input_ids"]))
    trainer = SFTTrainer(
        model=load_model(args),
        peft_config=lora_config(args),  # LoRA is injected here and nowhere else
        args=sft_config(job),
        train_dataset=dataset(job.train),
        eval_dataset=dataset(by_length) if job.eval else None,
        processing_class=job.tokenizer,
    )
    # Like lengths need less padding. Unlike transformers' group_by_length this draws from the
    # seed and the epoch, so that a resumed run goes the same way.
    batch = args.batch_size * args.gradient_accumulation_steps * job.n_processes
    lengths = [len(row["input_ids"]) for row in job.train]
    order = {"num_replicas": 1, "rank": 0, "seed": args.seed, "lengths": lengths}
    sampler = DistributedLengthGroupedSampler(batch, **order)
    trainer._get_train_sampler = lambda dataset=None: sampler
    # By default PEFT asks the hub, at each save, whether the embeddings were resized.
    save = trainer.model.save_pretrained
    trainer.model.save_pretrained = functools.partial(save, save_embedding_layers=False)
    trainer.remove_callback(PrinterCallback)
    return trainer


def check_injection(model, plan):
    """Exit unless LoRA's float32 weights alone are trainable, as many as planned."""
    counts = model.get_nb_trainable_parameters()
    trained = {name: str(p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    odd = trained.keys() ^ {name for name, _ in model.named_parameters() if "lora_" in name}
    odd |= {f"{name} in {dtype}" for name, dtype in trained.items() if dtype != "torch.float32"}
    found = "{:,} of {:,} parameters are trainable".format(*counts)
    if odd or counts != (plan.trainable, plan.total):
        fault = f"{found}, planned were {plan.trainable:,} of {plan.total:,}; nothing is trained"
        raise SystemExit(listed([f"LoRA is not injected as planned: {fault}", *sorted(odd)]))
    report("model", f"LoRA is injected as planned:\n{found}, LoRA's alone, in float32")


def fit_memory(trainer, job):
    """Recompute activations only for batches that do not fit in memory: it is 45 % more work."""
    import torch
    from transformers import set_seed
    from transformers.modeling_layers import GradientCheckpointingLayer

    model, limit = trainer.model, math.inf  # tokens of the largest batch that is kept
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # torch's recomputation needs no gradient of embeddings
    layers = [one for one in model.modules() if isinstance(one, GradientCheckpointingLayer)]

    def recompute_if_large(_, __, inputs):
        for layer in layers:
            layer.gradient_checkpointing = inputs["input_ids"].numel() > limit

    def overflows(rows):
        inputs = trainer._prepare_inputs(trainer.data_collator(rows))
        try:  # a step's passes without its metrics, which wait for all processes
            model(**inputs, fused_lm_head=True).loss.backward()
        except torch.OutOfMemoryError:
            return True
        finally:
            model.zero_grad()
            torch.cuda.empty_cache()
        return False

    model.register_forward_pre_hook(recompute_if_large, with_kwargs=True)
    if job.args.device == "cpu":
        return
    free, total = torch.cuda.mem_get_info()
    # A tenth is for the optimizer's states, and for memory in pieces.
    fraction = 0.9 * (free + torch.cuda.memory_reserved()) / total
    torch.cuda.set_per_process_memory_fraction(fraction)
    model.train()
    rows, size = sorted(job.train, key=lambda row: len(row["input_ids"])), job.args.batch_size
    batches = [rows[n : n + size] for n in range(max(1, len(rows) - size + 1))]  # by length
    if overflows(batches[-1]):
        n_fit = bisect.bisect_left(batches, True, key=overflows)  # how many, from the shortest
        limit = size * len(batches[n_fit - 1][-1]["input_ids"]) if n_fit else 0
        if overflows(batches[-1]):
            longest = len(rows[-1]["input_ids"])
            raise torch.OutOfMemoryError(f"{size} x {longest:,} tokens do not fit")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.reset_peak_memory_stats()
    set_seed(job.args.seed)
    kept = "all batches" if limit == math.inf else f"batches of up to {limit:,} tokens"
    report("memory", f"activations are kept for {kept}, else recomputed")


# ==== 9 Training: losses, checkpoints, signals


class Callbacks:
    """A run's callbacks; train() adds the base class, which is slow to import."""

    job, began, stopping = None, 0.0, False

    def on_step_begin(self, *_, **__):
        """From here on there is something to save."""
        self.job.is_training, self.began = True, time.monotonic()

    def on_log(self, _, state, __, logs, **___):
        """Print a loss, and exit if it is not finite."""
        job, step = self.job, state.global_step
        job.history = state.log_history
        for key in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(key, 0)):
                advice = "lower LEARNING_RATE or set DTYPE to float32, with --resume never"
                if step <= 1 and key != "grad_norm":  # B is still zero
                    advice = "it is the base's own: check its weights, or set DTYPE to float32"
                fault = f"train: {key} is {logs[key]} at step {step}"
                raise SystemExit(f"{fault}; no adapter; {advice}")
        if "eval_loss" in logs:
            report("eval", f"epoch {state.epoch or 0:g}  loss {logs['eval_loss']:.4f}")
        if "loss" in logs:
            job.seconds += time.monotonic() - self.began
            job.tokens = int(logs["num_tokens"])
            if step % job.args.logging_steps == 0:
                text = "step {:,}/{:,}  loss {loss:.4f}  gradient norm {grad_norm:.3f}  "
                text += "learning rate {learning_rate:.2e}  {:,.0f} tokens/s"
                rate = job.tokens / job.seconds
                report("train", text.format(step, state.max_steps, rate, **logs))

    def on_step_end(self, args, state, control, **_):
        """Save and stop, all processes after the same step, if one was told to."""
        import torch
        from accelerate.utils import reduce

        # Only the sum over the processes decides: one may be told to just after it.
        self.stopping = bool(reduce(torch.tensor(self.job.stopped_by, device=args.device), "sum"))
        # An epoch's last step is saved after its evaluation, which moves the random state.
        is_last = state.global_step % self.job.plan.steps_per_epoch == 0
        control.should_save = (control.should_save or self.stopping) and not is_last
        control.should_training_stop |= self.stopping

    def on_epoch_end(self, _, state, control, **__):
        """Evaluate and save, unless a signal ended the epoch."""
        control.should_save = state.global_step % self.job.plan.steps_per_epoch == 0
        control.should_evaluate &= control.should_save

    def on_save(self, args, state, _, **__):
        """Mark a checkpoint as complete, and prune the older ones."""
        from accelerate import PartialState

        PartialState().wait_for_everyone()  # each process writes its own random state
        if is_first_process():
            folder = Path(args.output_dir)
            (folder / "README.md").unlink(missing_ok=True)  # TRL's, which describes no run
            new = folder / f"checkpoint-{state.global_step}"
            write_json(new / "complete.json", hashes(new))
            prune(folder, self.job.plan.steps_per_epoch, newest=2)


def train(trainer, job):
    """Train to the end, or until a signal: then raise KeyboardInterrupt(signal, message)."""
    import torch
    from transformers import TrainerCallback

    watch = type("Callbacks", (Callbacks, TrainerCallback), {"job": job})()
    trainer.add_callback(watch)
    if job.checkpoint:  # else several processes take the first epoch's order
        epoch = int(job.checkpoint.name[11:]) // job.plan.steps_per_epoch
        trainer._get_train_sampler().set_epoch(epoch)
    trainer.train(resume_from_checkpoint=job.checkpoint and str(job.checkpoint))
    job.is_training, job.peak_gib = False, torch.cuda.max_memory_allocated() / 2**30
    if watch.stopping or job.stopped_by:
        step = trainer.state.global_step
        done = f"stopped at step {step:,} of {job.plan.steps:,}; the same command goes on from"
        message = f"{done} {job.output}/checkpoints/checkpoint-{step}"
        raise KeyboardInterrupt(job.stopped_by or signal.SIGTERM, message)


# ==== 10 Results: the adapter, its proof, and what shows what it does


def save_adapter(model, job, folder):
    """Write folder/final_lora, and final_lora_vllm if vLLM needs it."""
    from peft import PeftConfig
    from safetensors.torch import load_file, save_file

    final, vllm = folder / "final_lora", folder / "final_lora_vllm"
    model.save_pretrained(final)
    job.tokenizer.save_pretrained(final)
    asked, saved = vars(lora_config(job.args)), vars(PeftConfig.from_pretrained(final))
    for key in ("r", "lora_alpha", "lora_dropout", "target_modules", "bias", "task_type"):
        if saved[key] != asked[key]:
            fault = f"{key} is {saved[key]}, not {asked[key]} as asked"
            raise SystemExit(f"{final}/adapter_config.json: {fault}")
    tensors = load_file(final / "adapter_model.safetensors")
    plain, wrapped = "base_model.model.model.", "base_model.model.model.language_model."
    is_wrapper = job.config.get_text_config() is not job.config
    if is_wrapper and not any(name.startswith(wrapped) for name in tensors):
        # Up to 0.32 vLLM accepts a wrapper's adapter under other names, and serves the base.
        vllm.mkdir()
        shutil.copy(final / "adapter_config.json", vllm)
        renamed = {name.replace(plain, wrapped, 1): tensor for name, tensor in tensors.items()}
        save_file(renamed, vllm / "adapter_model.safetensors", {"format": "pt"})
    # It is written for its owner alone, but a server may be another user.
    for path in folder.glob("*/adapter_model.safetensors"):
        shutil.copymode(final / "adapter_config.json", path)


def prove(model, folder, row):
    """Return the base with folder's adapter from disk; exit unless tensors and logits are model's.

    model gives up its adapter here. A GPU may round otherwise: a tenth of the effect is allowed.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import load_file

    kept = get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = load_file(folder / "adapter_model.safetensors")
    odd = kept.keys() ^ saved.keys()
    for name in kept.keys() & saved.keys():
        tensor, is_zero = saved[name], "lora_B" in name and not saved[name].any()
        if is_zero or not tensor.isfinite().all() or not tensor.equal(kept[name].cpu()):
            odd.add(name)
    if odd:
        fault = "not as trained, not finite or all zero"
        raise SystemExit(f"proof: in {folder} {fault}: {listed(sorted(odd), 3, ', ')}")
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
    report("proof", found)
    return reloaded


def publish(trainer, job):
    """Write the adapter beside its place, prove it, move it in; return the proved model."""
    partial, folder = job.output / ".partial", job.output / "checkpoints"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        save_adapter(trainer.model, job, partial)
        model = prove(trainer.model, partial / "final_lora", (job.eval or job.train)[0])
        for name in ("final_lora", "final_lora_vllm", "samples.md", "loss.png"):
            set_aside(job.output / name)
        for new in partial.iterdir():
            new.rename(job.output / new.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    (folder / "job.json").unlink(missing_ok=True)
    job.is_published = True
    prune(folder, job.plan.steps_per_epoch, newest=0)
    return model


def answer(model, job, row):
    """Return the model's greedy reply to a row's prompt."""
    import torch

    tokenizer, start = job.tokenizer, row["labels"].count(-100)
    ids = torch.tensor([row["input_ids"][:start]], device=model.device)
    how = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}  # greedy
    how |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    how |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": job.args.max_new_tokens}
    ids = model.generate(input_ids=ids, **how)
    reply = ids[0, start:].tolist()
    cut = " [cut here]" * (tokenizer.eos_token_id not in reply)
    return tokenizer.decode(reply, skip_special_tokens=True) + cut


def write_samples(model, job, path):
    """Write held-out prompts with the base's, the adapter's and the written reply."""
    args, count = job.args, min(job.args.num_samples, len(job.eval))
    text = f"# Replies with and without the adapter\n\n{args.model_name}, r={args.lora_r}, "
    text += f"alpha={args.lora_alpha}, {args.num_epochs} epochs of {args.train_file}; greedy.\n"
    for row in [job.eval[i * len(job.eval) // count] for i in range(count)]:
        *said, written = [(m["role"], m["content"]) for m in row["messages"][: row["reply"] + 1]]
        with model.disable_adapter():
            said.append(("base", answer(model, job, row)))
        said += [("adapter", answer(model, job, row)), ("written", written[1])]
        text += f"\n## {row['where']}\n"
        for who, reply in said:
            quoted = [f"> {line}\n" for line in re.split(r"\r\n?|\n", reply.strip())]
            text += f"\n**{who}**\n\n" + "".join(quoted)
    if count:
        path.write_text(text, encoding="utf-8")
        report("samples", f"{count} held-out prompts answered with and without the adapter")


def draw_losses(_, job, path):
    """Draw the train loss, raw and smoothed, and the eval loss over the steps."""
    os.environ.pop("MPLBACKEND", None)  # nothing is shown, and an unknown name is an error
    from matplotlib.figure import Figure

    args, per_epoch = job.args, job.plan.steps_per_epoch
    steps, losses = zip(*((e["step"], e["loss"]) for e in job.history if "loss" in e), strict=True)
    width = max(1, len(losses) // 25)
    windows = [losses[max(0, i - width) : i + width + 1] for i in range(len(losses))]
    smooth = [statistics.fmean(window) for window in windows]
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, label="train, each step")
    axes.plot(steps, smooth, color="tab:blue", label=f"train, mean of {2 * width + 1} steps")
    evals = [(entry["step"], entry["eval_loss"]) for entry in job.history if "eval_loss" in entry]
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="tab:orange", label="eval")
    for step in range(per_epoch, steps[-1] + 1, per_epoch):
        axes.axvline(step, color="gray", linestyle=":", linewidth=1)
    name = "/".join(Path(args.model_name).parts[-2:])
    axes.set_title(f"{name}, r={args.lora_r}, alpha={args.lora_alpha}", parse_math=False)
    axes.set(xlabel="step (dotted: end of an epoch)", ylabel="loss, nats per token")
    axes.legend(frameon=False)
    figure.savefig(path)


def serve_command(job):
    """Return the command that serves the saved adapter."""
    config = json.loads((job.output / "final_lora/adapter_config.json").read_text("utf-8"))
    rank = min(rank for rank in VLLM_RANKS if rank >= config["r"])
    vllm = job.output / "final_lora_vllm"
    adapter = f"companion={vllm if vllm.exists() else job.output / 'final_lora'}"
    words = [job.args.model_name, job.args.model_revision, adapter]
    model, revision, adapter = map(shlex.quote, words)
    return f"""vllm serve {model} --revision {revision} \\
  --enable-lora --max-lora-rank {rank} --lora-modules {adapter} \\
  --default-chat-template-kwargs '{{"enable_thinking": false}}'"""


def write_card(_, job, path):
    """Write how to serve the adapter into its model card."""
    args, head = job.args, path.read_text("utf-8").split("---\n")[1]
    text = f"""---
{head}---

# LoRA adapter for {args.model_name}

r={args.lora_r}, alpha={args.lora_alpha}, on {", ".join(args.lora_target_modules)}.
It was trained behind the prompt that `enable_thinking=false` makes: keep that setting.

```
{serve_command(job)}
```
"""
    path.write_text(text, encoding="utf-8")


def write_extras(model, job):
    """Write samples, picture and card; an error in one is a warning."""
    extras = {"samples.md": write_samples, "loss.png": draw_losses}
    for name, write in (extras | {"final_lora/README.md": write_card}).items():
        try:
            write(model, job, job.output / name)
        except Exception as error:
            LOG.info(name, exc_info=True)
            report("warning", f"{name} is not written ({error!r}); the adapter is whole")


def summarize(job):
    """Print what the run did, where its results are, how to serve them."""
    output, evals = job.output, [entry for entry in job.history if "eval_loss" in entry]
    size = (output / "final_lora/adapter_model.safetensors").stat().st_size / 1e6
    losses = " -> ".join(f"{entry['eval_loss']:.4f}" for entry in evals) or "not evaluated"
    lines = [f"adapter    {output}/final_lora, {size:.1f} MB", f"eval loss  {losses}"]
    best = min(evals, key=lambda entry: entry["eval_loss"], default=None)
    if best and best["eval_loss"] < evals[-1]["eval_loss"]:
        where = f"{output}/checkpoints/checkpoint-{best['step']}" if best["step"] else "the base"
        lines.append(f"overfit    lowest with {where}; lower NUM_EPOCHS or LEARNING_RATE")
    rate, in_all = job.tokens / max(job.seconds, 1e-9), (time.time() - job.facts["started"]) / 60
    since = " since the checkpoint" * bool(job.checkpoint)
    lines.append(f"time       {in_all:.1f} min, {job.seconds / 60:.1f} in steps{since}")
    lines.append(f"speed      {rate:,.0f} tokens/s, {job.peak_gib:.1f} GiB of GPU memory")
    names = [name for name in ("samples.md", "loss.png", "run.json") if (output / name).exists()]
    lines.append(f"look at    {', '.join(f'{output}/{name}' for name in names)}")
    if job.args.demo:
        lines.append("The demo's weights are random: it shows that the job runs.")
    report("done", "\n".join(lines))
    report("next", serve_command(job))


# ==== 11 run, main


def run(job):
    """Do the job; this is the table of contents, with the sections' numbers."""
    args = job.args
    examples = read_examples(args.train_file)  # 3
    held_out = read_examples(args.eval_file) if args.eval_file else []
    warn_of_repeats(examples, held_out)
    if not args.dry_run:
        job.n_processes = 0  # not known yet
        job.n_processes = join_processes(args)  # 4
        job.device = check_device(args)
    job.config, job.tokenizer = load_config_and_tokenizer(args)
    job.train = encode(examples, job.tokenizer, args.max_seq_len)  # 5
    job.eval = encode(held_out, job.tokenizer, args.max_seq_len)
    files = {args.train_file: job.train, args.eval_file: job.eval}
    job.data = report_tokens({path: rows for path, rows in files.items() if rows})
    show_example(job.train[0], job.tokenizer)
    job.plan = make_plan(args, job.config, len(job.train), job.n_processes)  # 6
    if args.dry_run:
        return
    report("device", job.device)
    job.checkpoint = find_checkpoint(job)  # 7
    job.facts = describe_run(job)
    write_record(job, "running")
    trainer = build_trainer(job)  # 8
    check_injection(trainer.model, job.plan)
    fit_memory(trainer, job)
    train(trainer, job)  # 9
    if is_first_process():
        model = publish(trainer, job)  # 10
        write_extras(model, job)
        write_record(job, "finished")
        summarize(job)


def set_environment(args):
    """Set what libraries read at import; take away what would undo a constant."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # of TRL
    if args.device == "cpu":  # beside another busy process 28 s, not 245
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]  # a launcher's autocast, FSDP, torch.compile
    logging.getLogger("transformers.integrations.hub_kernels").setLevel("ERROR")  # "install fla"
    # A call of PEFT's own.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def catch_signals(job):
    """Have a signal save and stop training, or stop all else; return old handlers."""

    def on_signal(number, _):
        again, job.stopped_by = job.stopped_by, number
        if job.is_training and not again:
            report("stopping", "this step is finished and saved first; once more stops at once")
            return
        message = "stopped; the same command goes on from the newest checkpoint, if any"
        if job.is_published:
            message = f"stopped; {job.output}/final_lora is whole"
        raise KeyboardInterrupt(number, message)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    taken = [one for one in signals if signal.getsignal(one) != signal.SIG_IGN]  # as under nohup
    return {one: signal.signal(one, on_signal) for one in taken}


def explain(error):
    """Return (status, message) for what ended a run; status 0 is a bug."""
    kind, text = type(error).__name__, brief(error)
    if isinstance(error, SystemExit):
        return 1, str(error)
    if isinstance(error, KeyboardInterrupt):
        number, message = error.args if len(error.args) == 2 else (signal.SIGINT, "stopped")
        return 128 + number, message
    if isinstance(error, ImportError):
        return 1, f"{error}; pip install -r requirements.txt"
    if kind == "OutOfMemoryError":
        advice = "lower BATCH_SIZE and raise GRADIENT_ACCUMULATION_STEPS, or lower MAX_SEQ_LEN"
        return 1, f"out of memory ({text}); {advice}; see nvidia-smi"
    # Other libraries' errors for a file that cannot be written.
    is_others = kind in ("SafetensorError", "Exception") or "inline_container" in text
    if isinstance(error, OSError) or is_others:
        advice = "make room, and the same command goes on from the newest checkpoint"
        return 1, f"a file could not be written or read ({text}); {advice}"
    return 0, repr(error)


def main(argv=None):
    """Run the command; exit with 1, or 2 after a bad flag, or 128 + a signal."""
    args = parse_args(argv)
    set_environment(args)
    job, status = Job(args), 0
    handlers = catch_signals(job)
    try:
        if is_first_process() and not args.dry_run:
            open_log(job.output)
        run(job)
    except BaseException as error:
        for one in handlers:  # nothing may break off the rest
            signal.signal(one, signal.SIG_IGN)
        LOG.info("ended by", exc_info=True)
        status, message = explain(error)
        if job.stopped_by and status < 2:
            status, message = 128 + job.stopped_by, "stopped"
        write_record(job, f"{'interrupted' if status > 1 else 'failed'}: {message}")
        if not status:
            raise
        if is_first_process() or job.n_processes != 1:
            print(message, file=sys.stderr)
    finally:
        for one, handler in handlers.items():
            signal.signal(one, handler)
        logging.shutdown()
    if status:
        raise SystemExit(status)


class Unbreakable(io.FileIO):
    """An output whose reader may go away: the run goes on."""

    def write(self, data):
        """Write data, or drop it."""
        with contextlib.suppress(OSError):
            return super().write(data)
        return len(data)


if __name__ == "__main__":
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            raw = Unbreakable(number, "w", closefd=False)
        except OSError:  # closed by the shell
            raw = open(os.devnull, "wb", 0)  # noqa: SIM115
        setattr(sys, name, io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True))
    main()
