"""Train a LoRA adapter for Qwen3.5-4B on conversations, on one GPU.

    python train_lora_single.py              # the job set below: data/train.jsonl -> output/final_lora
    python train_lora_single.py --demo       # the same code on a tiny model with random weights, on the CPU
    python train_lora_single.py --dry_run    # check the data and print the plan; needs no weights and no GPU
    python train_lora_single.py --lora_r 16 --lora_alpha 32    # each constant below is a flag too; see --help

LoRA leaves a weight W (d x k) frozen and learns y = W x + (alpha / r) B A x, with A (r x k) and B (d x r).
The run checks each line of data, prints what it will train before it loads a weight, trains, and leaves in OUTPUT_DIR:
final_lora (the adapter in PEFT's form), final_lora_vllm (for vLLM, where needed), checkpoints and all_logs.log.
"""

import argparse
import contextlib
import difflib
import json
import logging
import math
import os
import re
import reprlib
import shutil
import statistics
import sys
import sysconfig
import textwrap
import time
import traceback
import warnings
from pathlib import Path

# ---- constants: edit them here, or give the flag of the same name in lower case -------------------------------------

# Model: any text model, on the hub or in a folder, whose layers have the modules named in LORA_TARGET_MODULES.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # hub name, or a folder with safetensors; loaded without its vision tower
MODEL_REVISION = "main"  # branch, tag or commit on the hub; a commit makes the run repeatable
DEVICE = "cuda"  # "cuda", or "cpu" for a model of up to a billion parameters
DTYPE = "bfloat16"  # of the frozen weights: "bfloat16" or "float32"; LoRA's own weights are always float32

# Data: one JSON object a line, {"prompt": [messages], "completion": [reply]} or {"messages": [messages]}.
TRAIN_FILE = "data/train.jsonl"  # what is learnt
EVAL_FILE = "data/eval.jsonl"  # held out, to see overfitting; "" turns evaluation off
MAX_SEQ_LEN = 512  # tokens; longer examples are left out. LoRA saves no activation memory: that grows with this

# LoRA. r is the rank of the update: 4 for a very narrow task or against overfitting, 8 for about a thousand examples
# of a style, 16 and more for complex behaviour or several domains, with caution on little data.
LORA_R = 8  # rank r; changed, it needs a new training: an older adapter's tensors have other shapes
# alpha / r multiplies the LoRA branch, so it works like a step size. 16 / 8 = 2 is a common start: much larger
# oscillates, much smaller does not learn. To change r alone, change alpha with it.
LORA_ALPHA = 16  # the LoRA branch is scaled by alpha / r
LORA_DROPOUT = 0.05  # on the LoRA branch only; against learning repeated phrases by heart
# Attention (q, k, v, o) steers what is looked at, the FFN (gate, up, down) the choice of words and the rhythm: a style
# lives in both. q and v alone train too, with less effect. The names must be exact; a misspelt one is refused.
LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # what LoRA adapts

# Training. Steps = ceil(examples / (BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS)) x NUM_EPOCHS.
NUM_EPOCHS = 3  # passes over the training file; fewer if the eval loss turns up
BATCH_SIZE = 2  # examples at once on the GPU; out of memory: lower this first, then MAX_SEQ_LEN
GRADIENT_ACCUMULATION_STEPS = 2  # batches per optimizer step; raise it as BATCH_SIZE falls, to keep the product
LEARNING_RATE = 2e-4  # the peak; about ten times that of full fine-tuning
LR_SCHEDULER_TYPE = "cosine"  # after the warm-up: "cosine", "linear" or "constant_with_warmup"
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises from 0
SEED = 42  # of A's first values, dropout and the order of the examples

# Output.
OUTPUT_DIR = "output"  # all results go here
LOGGING_STEPS = 10  # steps between two printed losses
SAVE_STEPS = 50  # steps between two checkpoints; the two newest are kept

# What --demo changes: a tiny model with random weights, in float32, which a CPU without bf16 runs five times as fast.
DEMO = {"model_name": "tests/tiny-qwen3.5", "output_dir": "output/demo", "device": "cpu", "dtype": "float32",
        "num_epochs": 1, "learning_rate": 1e-2, "max_seq_len": 1024}  # fmt: skip

# What vLLM's --max-lora-rank takes.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the constants as changed by --demo and the flags; a bad flag or value exits with status 2."""
    argv = sys.argv[1:] if argv is None else argv
    form, usage = argparse.RawDescriptionHelpFormatter, "%(prog)s [--demo] [--dry_run] [--CONSTANT VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, formatter_class=form, allow_abbrev=False)
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
    choices = {"DEVICE": ["cuda", "cpu"], "DTYPE": ["bfloat16", "float32"]}
    choices["LR_SCHEDULER_TYPE"] = ["cosine", "linear", "constant_with_warmup"]
    below = {"SEED": 2**32, "LORA_DROPOUT": 1, "WARMUP_RATIO": 1, "LORA_R": VLLM_RANKS[-1] + 1}
    for name in constants:
        value, top, zero = vars(args)[name.lower()], below.get(name, math.inf), name in below and name != "LORA_R"
        good, rule = value or name == "EVAL_FILE", "given"
        if name == "LORA_TARGET_MODULES":
            good, rule = value and isinstance(value, list), "a list of names"
        elif isinstance(value, (int, float)):
            good = 0 < value < top or (zero and value == 0)
            rule = f"{'at least' if zero else 'above'} 0 and below {top}"
        elif name in choices:
            good, rule = value in choices[name], " or ".join(choices[name])
        if not good:
            parser.error(f"--{name.lower()} {value}: must be {rule}")
    return args


def say(section: str, text: str) -> None:
    """Print text with the section's name to the left of its first line."""
    print(f"{section:<9}" + text.replace("\n", "\n" + " " * 9), flush=True)


def first(items: list[str], limit: int = 20, separator: str = "\n") -> str:
    """Join the first items, and say how many more there are."""
    return separator.join(items[:limit] + [f"... and {len(items) - limit:,} more"] * (len(items) > limit))


def parse_line(text: str) -> tuple[list[tuple[list[dict], dict]], set[str]]:
    """Return a line's (prompt, reply) pairs, one for each reply to be learnt, and its other keys; or raise ValueError.

    {"prompt": [...], "completion": [reply]} is one pair, {"messages": [...]} one for each assistant message.
    """

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON; write a string or a number")

    def unique(pairs):
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
                case {"role": "system" | "user" | "assistant" as role, "content": str(content), **rest} if not rest:
                    roles.append(role)
            if len(roles) < number or not content.strip() or re.search("[\ud800-\udfff]", content):
                rule = "role (system, user or assistant), content (text, not blank, no lone surrogate), nothing else"
                raise ValueError(f"{key} message {number} is {reprlib.repr(message)}; write {rule}")
        if not re.fullmatch(order[key][0], "".join(role[0] for role in roles)):
            rule = f"a list of messages, at most one system, then user and assistant in turn, {order[key][1]}"
            raise ValueError(f"{key} is {first(roles, 6, ', ') or reprlib.repr(row[key])}; write {rule}")
    turns = row["messages"] if form == ["messages"] else row["prompt"] + row["completion"]
    replies = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    return [(turns[:i], turns[i]) for i in (replies if form == ["messages"] else replies[-1:])], row.keys() - form


def read_examples(path: str) -> list[dict]:
    """Return a JSONL file's examples {"where": "path:line", "prompt": [...], "reply": {}}; exit with all bad lines."""
    examples, problems, unused = [], [], set()
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.removeprefix(b"\xef\xbb\xbf").decode("utf-8").strip()
                    pairs, others = parse_line(text) if text else ([], set())
                    examples += [{"where": f"{path}:{number}", "prompt": p, "reply": r} for p, r in pairs]
                    unused |= others
                except json.JSONDecodeError as error:
                    problems.append(
                        f"{path}:{number}: not JSON at column {error.colno}, {error.msg}; one object a line"
                    )
                except UnicodeDecodeError as error:
                    problems.append(f"{path}:{number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8")
                except RecursionError:
                    problems.append(f"{path}:{number}: nested too deeply; write an object with a list of messages")
                except ValueError as error:
                    problems.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; set TRAIN_FILE and EVAL_FILE to JSONL files") from None
    if problems or not examples:
        raise SystemExit(first(problems) or f"{path}: no examples; write one JSON object a line")
    keys = "; keys not used: " * bool(unused) + first([ascii(key)[1:-1] for key in sorted(unused)], 6, ", ")
    say("data", f"{path}: {len(examples):,} example{'s' * (len(examples) > 1)}{keys}")
    return examples


def warn_of_repeats(train: list[dict], evaluation: list[dict]) -> None:
    """Print the lines that repeat an example of their file, and the eval prompts that are also trained on."""
    notes, prompts = {}, {json.dumps(e["prompt"], sort_keys=True): e["where"] for e in reversed(train)}
    for examples in (train, evaluation):
        seen = {}
        for example in examples:
            prompt, where = json.dumps(example["prompt"], sort_keys=True), example["where"]
            if (before := seen.setdefault((prompt, example["reply"]["content"]), where)) != where:
                notes[f"{where} repeats {before}"] = None
            elif examples is evaluation and prompt in prompts:
                notes[f"{where} has the prompt of {prompts[prompt]}; it tests nothing new"] = None
    if notes:
        say("warning", first([*notes]))


def check_device(args: argparse.Namespace) -> str:
    """Return a line about the device, or exit if it cannot train. To be called before transformers is imported."""
    import torch

    # A call of PEFT's, not the user's. Below: transformers' advice to install fla, which runs from sm_80 on only.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if args.device == "cpu":
        logging.getLogger("transformers.integrations.hub_kernels").setLevel("ERROR")
        return "CPU, as DEVICE says"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        raise SystemExit("DEVICE cuda: start it with python, not a launcher: one process, no mixed precision")
    # Where NVML answers, device_count() does not start CUDA, so CUDA_VISIBLE_DEVICES still takes effect after it.
    several = torch.cuda.device_count() > 1
    if several:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if not torch.cuda.is_available():
        advice = "without one, --demo runs the job on a tiny model, and --device cpu trains a small MODEL_NAME"
        raise SystemExit(f"DEVICE cuda: torch sees no GPU here; {advice}")
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    gpu = 10 * major + minor
    # A kernel for X.Y runs on X.Z, Z >= Y; PTX (compute_XY) also on later majors; those marked a only on X.Y itself.
    # Where none fits, is_available() is still True, and the first kernel dies. ROCm's names match nothing here.
    built = re.findall(r"(sm|compute)_(\d+)([a-z]?)", " ".join(torch.cuda.get_arch_list()))
    fits = [kind == "compute" or int(n) // 10 == major for kind, n, special in built if not special and int(n) <= gpu]
    if built and not any(fits) and gpu not in [int(n) for _, n, _ in built]:
        advice = 'pip install "torch>=2.7,<2.11", whose newest wheels reach from sm_70 (V100) to sm_120'
        raise SystemExit(f"DEVICE cuda: this torch has no kernels for {name}, sm_{gpu}; {advice}")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")) or not header.exists():
        raise SystemExit(f"DEVICE cuda: TRL compiles its loss when first used; install gcc and Python's {header}")
    if major < 8:
        # Neither supports these GPUs, but transformers takes fla wherever it can be imported. Its own code is correct.
        sys.modules["fla"] = sys.modules["causal_conv1d"] = None
        logging.getLogger("transformers.integrations.hub_kernels").setLevel("ERROR")
    bf16 = "native" if major >= 8 else "emulated, slower than fp32; DeltaNet runs without fla, which needs sm_80"
    memory = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB"
    note = "\nof several visible GPUs only the first is used" * several
    return f"{name}, sm_{gpu}, {memory}; this torch has its kernels\nbf16 is {bf16}{note}"


def load_config_and_tokenizer(args: argparse.Namespace) -> tuple:
    """Return MODEL_NAME's (config, tokenizer), or exit with one message if there is no such model."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import httpx
    from transformers import AutoConfig, AutoTokenizer

    name, where = args.model_name, {"revision": args.model_revision, "trust_remote_code": False}
    try:
        # One request first: from_pretrained alone spends 25 s on retries before it says that there is no network.
        if not Path(name).is_dir() and not try_to_load_from_cache(name, "config.json", revision=args.model_revision):
            HfApi().model_info(name, revision=args.model_revision, timeout=10)
        config, tokenizer = AutoConfig.from_pretrained(name, **where), AutoTokenizer.from_pretrained(name, **where)
    except (httpx.HTTPError, OSError, ValueError) as error:
        fault = "a broken folder" if Path(name).is_dir() else "no folder here, and not to be had from the hub"
        reason = textwrap.shorten(str(error), 300)
        raise SystemExit(f"MODEL_NAME {name}: {fault}; check name and network, or try --demo ({reason})") from None
    if not tokenizer.chat_template or tokenizer.eos_token_id is None:
        raise SystemExit(f"MODEL_NAME {name}: no chat template or no end-of-turn token; use a model made for chat")
    return config, tokenizer


def encode(examples: list[dict], tokenizer, max_seq_len: int) -> list[dict]:
    """Tokenize examples as a server with enable_thinking=false would; return those of at most max_seq_len tokens.

    To each it adds input_ids (prompt, reply, end-of-turn token) and labels (-100 on the prompt). The ids before a
    reply are those that a server makes, in every turn. Longer examples are left out by name: cut, they would teach the
    model not to stop. Exits if over a tenth are, if a text holds a control token, if training would not equal serving.
    """
    from jinja2 import TemplateError

    serving = {"tokenize": False, "enable_thinking": False}
    control = re.compile("|".join(re.escape(str(t)) for t in tokenizer.added_tokens_decoder.values() if t.special))
    texts, rows, too_long, problems = [], [], [], []
    for example in examples:
        conversation = [*example["prompt"], example["reply"]]
        try:
            texts.append(tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, **serving))
            texts.append(tokenizer.apply_chat_template(conversation, **serving))
        except TemplateError as error:
            problems.append(f"{example['where']}: the chat template refuses it ({error}); change the conversation")
        if found := [token for message in conversation for token in control.findall(message["content"])]:
            problems.append(f"{example['where']}: the text holds the control token {found[0]}; respell or remove it")
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts and not problems else []
    for example, prompt, whole in zip(examples, ids[::2], ids[1::2], strict=False):
        reply = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or tokenizer.eos_token_id not in reply:
            fault = f"its prompt is rendered otherwise before the reply, or the reply lacks {tokenizer.eos_token}"
            problems.append(f"{example['where']}: {fault}; training would not equal serving. Is there a think tag?")
            continue
        reply = reply[: reply.index(tokenizer.eos_token_id) + 1]
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


def report_tokens(parts: dict[str, list[dict]], tokenizer) -> None:
    """Print the lengths of each file's rows, and the first row with its trained part marked."""
    table = f"{'file':<24}{'examples':>9}{'min':>6}{'median':>8}{'p95':>6}{'max':>6}{'tokens':>11}{'trained':>18}"
    for path, rows in parts.items():
        n = sorted(len(row["input_ids"]) for row in rows)
        trained, p95 = sum(n) - sum(row["labels"].count(-100) for row in rows), n[math.ceil(0.95 * len(n)) - 1]
        table += f"\n{path:<24}{len(n):>9,}{n[0]:>6,}{statistics.median(n):>8,.0f}{p95:>6,}{n[-1]:>6,}{sum(n):>11,}"
        table += f"{trained:>11,} ({trained / sum(n):>4.0%})"
    row = next(iter(parts.values()))[0]
    start = row["labels"].count(-100)
    text = f"{tokenizer.decode(row['input_ids'][:start])}>>>{tokenizer.decode(row['input_ids'][start:])}<<<"
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, 90) or [""]]
    say("tokens", table)
    say("example", "\n".join([f"{row['where']} as the model sees it; only what stands in >>> <<< is trained", *lines]))


def make_plan(args: argparse.Namespace, config, n_train: int) -> dict[str, int]:
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
        near = [name for target in unknown for name in difflib.get_close_matches(target, names, n=1, cutoff=0)]
        asked = f"no layer has {', '.join(unknown)}; did you mean {', '.join(near)}?"
        raise SystemExit(f"LORA_TARGET_MODULES: {asked} The layers have {', '.join(names)}")
    text, r, scale, trainable = config.get_text_config(), args.lora_r, args.lora_alpha / args.lora_r, 0
    table = f"{'target':<12}{'in layers':<17}{'W (frozen)':>14}{'A':>11}{'B':>11}{'parameters':>14}"
    for target in targets:
        for (_, parent, d, k), layers in [item for item in linear.items() if item[0][0] == target]:
            trainable += (count := len(layers) * r * (d + k))
            kind = {"self_attn": "attention", "mlp": "FFN"}.get(parent, parent)
            table += f"\n{target:<12}{f'{len(layers)}/{text.num_hidden_layers} {kind}':<17}"
            table += f"{f'{d}x{k}':>14}{f'{r}x{k}':>11}{f'{d}x{r}':>11}{count:>14,}"
    total = trainable + sum(parameter.numel() for parameter in model.parameters())
    per_epoch = math.ceil(n_train / (args.batch_size * args.gradient_accumulation_steps))
    plan = {"trainable": trainable, "total": total, "steps": per_epoch * args.num_epochs}
    plan["max_lora_rank"] = min(rank for rank in VLLM_RANKS if rank >= r)
    say("plan", f"r={r} alpha={args.lora_alpha}, scale alpha/r = {scale:g}, dropout {args.lora_dropout:g}\n{table}")
    say("", f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")
    deltanet = {i for i, kind in enumerate(text.to_dict().get("layer_types") or []) if kind == "linear_attention"}
    absent = [t for t in targets if not any(deltanet & layers for key, layers in linear.items() if key[0] == t)]
    if deltanet and absent:
        say("", f"{len(deltanet)} of {text.num_hidden_layers} layers are Gated DeltaNet, without {', '.join(absent)}:")
        say("", f"in them LoRA adapts only {', '.join(t for t in targets if t not in absent) or 'nothing'}")
    batch = f"({args.batch_size} x {args.gradient_accumulation_steps})"
    say("", f"{plan['steps']:,} steps, {per_epoch:,} an epoch: ceil({n_train:,} / {batch}) x {args.num_epochs}")
    say("", f"adapter file {4 * trainable / 1e6:.1f} MB; vLLM needs --max-lora-rank {plan['max_lora_rank']} for r={r}")
    return plan


def check_room(args: argparse.Namespace, plan: dict[str, int]) -> None:
    """Exit if the model is too large for a CPU or the disk too full."""
    if args.device == "cpu" and plan["total"] > 1e9:
        raise SystemExit(
            f"DEVICE cpu: {plan['total']:,} parameters, over a billion; use a GPU or a smaller MODEL_NAME"
        )
    # 4 bytes each for both forms of the adapter, and three checkpoints of it and AdamW's two moments; tokenizers.
    need, free = plan["trainable"] * 44 / 1e6 + 100, shutil.disk_usage(args.output_dir).free / 1e6
    if free < need:
        raise SystemExit(f"OUTPUT_DIR {args.output_dir}: {free:,.0f} MB free, {need:,.0f} MB needed; make room")


def build_trainer(args: argparse.Namespace, tokenizer, train: list[dict], evaluation: list[dict]):
    """Return the SFTTrainer over the frozen model in DTYPE, with LoRA injected by the trainer and by nothing else."""
    from datasets import Dataset
    from peft import LoraConfig
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.trainer_pt_utils import DistributedLengthGroupedSampler
    from trl import SFTConfig, SFTTrainer

    batch = args.batch_size * args.gradient_accumulation_steps
    try:
        model = AutoModelForCausalLM.from_pretrained(
            args.model_name, revision=args.model_revision, dtype=args.dtype,
            trust_remote_code=False, use_safetensors=True,  # no code and no pickle from the hub
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        fault = f"no weights ({textwrap.shorten(str(error), 300)}); they must be whole safetensors files"
        raise SystemExit(f"MODEL_NAME {args.model_name}: {fault}") from None
    lora_config = LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=args.lora_target_modules, revision=args.model_revision,
    )  # fmt: skip
    sft_config = SFTConfig(
        output_dir=f"{args.output_dir}/checkpoints", seed=args.seed, report_to="none",
        num_train_epochs=args.num_epochs, per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps, per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=int(args.warmup_ratio * args.num_epochs * math.ceil(len(train) / batch)),
        # No autocast: the frozen products in DTYPE, LoRA's in float32. TRL turns bf16 on by itself.
        bf16=False, fp16=False,
        # Simulated for 2 x 512 tokens of Qwen3.5-4B: 9 GiB with recomputation, 24 without. Not measured on a V100.
        activation_checkpointing=args.device == "cuda",
        # The rows are tokenized: TRL must not render, cut or pack them. Packed, DeltaNet without fla would carry its
        # state from one conversation into the next.
        dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, packing=False,
        eval_strategy="epoch" if evaluation else "no",
        eval_on_start=bool(evaluation),  # B is zero then, so this is the base model's loss
        save_steps=args.save_steps, save_total_limit=2,
        logging_steps=1,  # each step's loss is checked and kept; LOGGING_STEPS says which are printed
        logging_nan_inf_filter=False,  # True puts a mean in the place of a NaN loss
        eos_token=tokenizer.eos_token,  # so that model and tokenizer agree on where a turn ends
        use_cpu=args.device == "cpu", disable_tqdm=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model,
        peft_config=lora_config,  # LoRA is injected here and nowhere else
        args=sft_config,
        train_dataset=Dataset.from_list(train).select_columns(["input_ids", "labels"]),
        eval_dataset=Dataset.from_list(evaluation).select_columns(["input_ids", "labels"]) if evaluation else None,
        processing_class=tokenizer,
    )
    # Batches of like lengths need less padding. transformers' group_by_length draws from the global random state, so a
    # run resumed from a checkpoint would go another way; this sampler draws from the seed and the epoch.
    lengths = [len(row["input_ids"]) for row in train]
    sampler = DistributedLengthGroupedSampler(batch, num_replicas=1, rank=0, seed=args.seed, lengths=lengths)
    trainer._get_train_sampler = lambda dataset=None: sampler
    return trainer


def check_injection(model, plan: dict[str, int]) -> None:
    """Print PEFT's count; exit unless it is the plan's, and LoRA's weights, in float32, are all that is trainable."""
    model.print_trainable_parameters()
    counts, planned = model.get_nb_trainable_parameters(), (plan["trainable"], plan["total"])
    trained = {name: str(p.dtype) for name, p in model.named_parameters() if p.requires_grad}
    odd = trained.keys() ^ {name for name, _ in model.named_parameters() if "lora_" in name}
    odd |= {f"{name} in {dtype}" for name, dtype in trained.items() if dtype != "torch.float32"}
    if odd or counts != planned:
        found = f"{counts[0]:,} of {counts[1]:,} parameters are trainable, not {planned[0]:,} of {planned[1]:,}"
        raise SystemExit(first([f"LoRA is not injected as planned; nothing is trained. {found}", *sorted(odd)]))
    say("model", "LoRA is injected as planned: its weights are float32 and trainable, all others frozen")


def train(trainer, args: argparse.Namespace) -> None:
    """Train to the end; exit with a message at the first loss or gradient norm that is not finite."""
    import torch
    from transformers import ProgressCallback

    class Progress(ProgressCallback):
        def on_log(self, _, state, control, logs=None, **kwargs):
            for key in ("loss", "grad_norm", "eval_loss"):
                if not math.isfinite(logs.get(key, 0)):
                    advice = "stopped, no adapter is kept; lower LEARNING_RATE, or set DTYPE to float32"
                    raise SystemExit(f"train: {key} is {logs[key]} at step {state.global_step}; {advice}")
            if "eval_loss" in logs:
                self.training_bar.write(f"{'eval':<9}epoch {state.epoch or 0:g}  loss {logs['eval_loss']:.4f}")
            elif "loss" in logs and state.global_step % args.logging_steps == 0:
                line = f"{'train':<9}step {state.global_step:,}/{state.max_steps:,}  loss {logs['loss']:.4f}  "
                line += f"gradient norm {logs['grad_norm']:.3f}  learning rate {logs['learning_rate']:.2e}"
                self.training_bar.write(line)

    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        advice = "lower BATCH_SIZE and raise GRADIENT_ACCUMULATION_STEPS, then lower MAX_SEQ_LEN"
        raise SystemExit(f"train: out of GPU memory at step {trainer.state.global_step}; {advice}") from None


def save_adapter(model, tokenizer, config, folder: Path, args: argparse.Namespace) -> None:
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
    if config.get_text_config() is not config:
        # A wrapper's modules vLLM finds under language_model. Up to 0.32 it accepts other names, and serves the base.
        vllm.mkdir()
        shutil.copy(final / "adapter_config.json", vllm)
        tensors = load_file(final / "adapter_model.safetensors")
        renamed = {name.replace(prefix, f"{prefix}language_model.", 1): tensor for name, tensor in tensors.items()}
        save_file(renamed, vllm / "adapter_model.safetensors", {"format": "pt"})


def set_aside(path: Path) -> None:
    """Rename what an earlier run left at path, if anything, so that its time stamp ends its name."""
    if path.exists():
        aside = f"{path}.{time.strftime('%Y%m%d-%H%M%S', time.localtime(path.stat().st_mtime))}"
        path.rename(aside)
        say("moved", f"{path} of an earlier run to {aside}")


def summarize(args: argparse.Namespace, plan: dict[str, int], history: list[dict], started: float) -> None:
    """Print where the adapter is, what the run did and what to do next."""
    final, vllm = Path(args.output_dir, "final_lora"), Path(args.output_dir, "final_lora_vllm")
    losses = [f"{entry['eval_loss']:.4f}" for entry in history if "eval_loss" in entry] or ["not evaluated"]
    say("done", f"adapter    {final}, {(final / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB")
    share, minutes = 100 * plan["trainable"] / plan["total"], history[-1]["train_runtime"] / 60
    say("", f"trained    {plan['trainable']:,} of {plan['total']:,} parameters, {share:.4f} %")
    say("", f"eval loss  {' -> '.join(losses)}")
    say("", f"time       {minutes:.1f} min of training, {(time.time() - started) / 60:.1f} min in all")
    if args.demo:
        say("", "The demo's weights are random: it shows that the job runs, not that replies get better.")
    say("next", f"vllm serve {args.model_name} --revision {args.model_revision} \\")
    say("", f"  --enable-lora --max-lora-rank {plan['max_lora_rank']} \\")
    say("", f"  --lora-modules companion={vllm if vllm.exists() else final} \\")
    say("", "  --default-chat-template-kwargs '{\"enable_thinking\": false}'")


class _Tee:
    """A stream that copies to a log what is not a progress bar (bars redraw themselves with carriage returns)."""

    def __init__(self, stream, log):
        self.stream, self.log = stream, log

    def write(self, text):
        if text.strip() and not self.log.closed and not re.search("[\r\x1b]", text):
            self.log.write(text.rstrip("\n") + "\n")
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def run(args: argparse.Namespace) -> None:
    """Do the job, a section a call."""
    started = time.time()
    examples, held_out = read_examples(args.train_file), read_examples(args.eval_file) if args.eval_file else []
    warn_of_repeats(examples, held_out)
    device = None if args.dry_run else check_device(args)
    config, tokenizer = load_config_and_tokenizer(args)
    train_rows = encode(examples, tokenizer, args.max_seq_len)
    eval_rows = encode(held_out, tokenizer, args.max_seq_len)
    report_tokens({args.train_file: train_rows} | ({args.eval_file: eval_rows} if eval_rows else {}), tokenizer)
    plan = make_plan(args, config, len(train_rows))
    if args.dry_run:
        return
    say("device", device)
    check_room(args, plan)
    output_dir, partial = Path(args.output_dir), Path(args.output_dir, "partial")
    set_aside(output_dir / "checkpoints")
    trainer = build_trainer(args, tokenizer, train_rows, eval_rows)
    check_injection(trainer.model, plan)
    train(trainer, args)
    shutil.rmtree(partial, ignore_errors=True)
    save_adapter(trainer.model, tokenizer, config, partial, args)
    for name in ("final_lora", "final_lora_vllm"):
        set_aside(output_dir / name)
    for new in partial.iterdir():
        new.rename(output_dir / new.name)
    partial.rmdir()
    summarize(args, plan, trainer.state.log_history, started)


def main(argv: list[str] | None = None) -> None:
    """Run the job with the constants as changed by flags, and copy what is printed to OUTPUT_DIR/all_logs.log."""
    args = parse_args(argv)
    if args.dry_run:
        return run(args)
    try:
        os.makedirs(args.output_dir, exist_ok=True)
        log = Path(args.output_dir, "all_logs.log").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115
    except OSError as error:
        raise SystemExit(f"OUTPUT_DIR {args.output_dir}: {error.strerror}; choose a folder to write in") from None
    with log, contextlib.redirect_stdout(_Tee(sys.stdout, log)), contextlib.redirect_stderr(_Tee(sys.stderr, log)):
        try:
            run(args)
        except (SystemExit, KeyboardInterrupt) as stop:
            print(str(stop) or "stopped by Ctrl-C; nothing is kept but the checkpoints", file=sys.stderr)
            raise SystemExit(1 if isinstance(stop, SystemExit) else 130) from None
        except BaseException:
            traceback.print_exc(file=log)
            raise


if __name__ == "__main__":
    main()
