"""Train a LoRA adapter for Qwen3.5-4B on conversations, on one GPU.

    python train_lora_single.py              # data/train.jsonl -> output/final_lora
    python train_lora_single.py --dry_run    # check data, print the plan; needs no GPU
    python train_lora_single.py --demo       # train a tiny model of random weights, on a CPU
    python train_lora_single.py --lora_r 16 --lora_alpha 32    # each constant is a flag too
    python train_lora_single.py --chat       # talk to output/final_lora
    python train_lora_single.py --compare DIR ...    # its finished runs, best first

y = W x + (alpha / r) B A x: W (d x k) stays, LoRA learns A (r x k) and B (d x r).
run(), at the end, is the table of contents.
"""

import argparse
import bisect
import fcntl
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
import types
import warnings
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if sys.version_info < (3, 11):
    raise SystemExit("Python 3.11 to 3.13 is needed; see README.md")


class Lazy(types.ModuleType):
    """A library that is imported when first used: bad data is reported before."""

    def __getattr__(self, name):
        """Return the library's own attribute."""
        return getattr(importlib.import_module(self.__name__), name)


torch, transformers, datasets, trl, peft, accelerate, safetensors = map(
    Lazy, ["torch", "transformers", "datasets", "trl", "peft", "accelerate", "safetensors.torch"]
)

# ==== 1 Constants: edit them here, or give the flag of the same name in lower case

# Model.
MODEL_NAME = "Qwen/Qwen3.5-4B"  # on the hub, or a folder
MODEL_REVISION = "main"  # branch, tag or commit
DEVICE = "cuda"  # "cuda", or "cpu", for a small model
DTYPE = "bfloat16"  # of the frozen weights, or "float32"
PRODUCTS = "auto"  # multiply in DTYPE ("dtype") or scaled "float16"; "auto" times both

# Data: lines of {"prompt": [...], "completion": [...]} or {"messages": [...]}.
TRAIN_FILE = "data/train.jsonl"  # what is learnt
EVAL_FILE = "data/eval.jsonl"  # held out, about a tenth; "" for none
MAX_SEQ_LEN = 512  # tokens; longer examples are left out

# LoRA.
LORA_R = 8  # rank: 4 for a narrow task, 8 for a style and 1,000 examples, 16 or more for more
LORA_ALPHA = 16  # alpha / r scales the update: 2 is usual, more may oscillate, less not learn
LORA_DROPOUT = 0.05  # on the LoRA branch only; against learning phrases by heart
LORA_TARGET_MODULES = [  # or DeltaNet's in_proj_qkv, in_proj_z, out_proj
    "q_proj", "k_proj", "v_proj", "o_proj",  # attention: what is looked at
    "gate_proj", "up_proj", "down_proj",  # feed-forward: words and rhythm
]  # fmt: skip

# Training.
NUM_EPOCHS = 3  # passes over the training file; fewer if the eval loss turns up
BATCH_SIZE = 2  # examples at once on the GPU; lower this first when memory is short
GRADIENT_ACCUMULATION_STEPS = 2  # batches a step, on all GPUs; raise it as BATCH_SIZE falls
LEARNING_RATE = 2e-4  # the peak; lower it if the loss jumps
LR_SCHEDULER_TYPE = "cosine"  # or "linear", "constant_with_warmup"
WARMUP_RATIO = 0.03  # share of the steps in which the learning rate rises from 0
SEED = 42  # of A's first values, dropout and the order of the examples

# Output.
OUTPUT_DIR = "output"  # final_lora, samples.md, lora.png, run.json, all_logs.log, checkpoints
LOGGING_STEPS = 10  # steps between two printed losses
SAVE_STEPS = 50  # steps between two checkpoints: what a kill loses at most
PUBLISH = "last"  # or "best": the epoch of the lowest eval loss becomes final_lora
NUM_SAMPLES = 5  # held-out prompts that base and adapter answer in samples.md
MAX_NEW_TOKENS = 200  # of a reply, else it is cut

DEMO = {
    "MODEL_NAME": "tests/tiny-qwen3.5", "OUTPUT_DIR": "output/demo", "DEVICE": "cpu",
    "DTYPE": "float32", "NUM_EPOCHS": 1, "LEARNING_RATE": 1e-2,
}  # fmt: skip

# ==== 2 Command line: a flag for each constant, and report()

# Types, or allowed values. A checkpoint made with other values of JOB_RULES is refused.
JOB_RULES = {
    "MODEL_NAME": str, "MODEL_REVISION": str, "DTYPE": ("bfloat16", "float32"), "MAX_SEQ_LEN": int,
    "LORA_R": range(1, 513), "LORA_ALPHA": int, "LORA_DROPOUT": float,
    "LORA_TARGET_MODULES": list, "NUM_EPOCHS": int, "BATCH_SIZE": int,
    "GRADIENT_ACCUMULATION_STEPS": int, "LEARNING_RATE": float,
    "LR_SCHEDULER_TYPE": ("cosine", "linear", "constant_with_warmup"), "WARMUP_RATIO": float,
    "SEED": range(2**32),
}  # fmt: skip
RULES = JOB_RULES | {
    "DEVICE": ("cuda", "cpu"), "PRODUCTS": ("auto", "dtype", "float16"), "TRAIN_FILE": str,
    "EVAL_FILE": str, "OUTPUT_DIR": str, "LOGGING_STEPS": int, "SAVE_STEPS": int,
    "PUBLISH": ("last", "best"), "NUM_SAMPLES": range(1001), "MAX_NEW_TOKENS": int,
}  # fmt: skip
LOG = logging.getLogger("train_lora_single")


def is_first():
    """Return whether this is the process that decides and writes."""
    return os.getenv("RANK", "0") == "0"


def report(section, text):
    """Print and log text beside the section's name."""
    if is_first():
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


@contextmanager
def blame(what, advice, *kinds):
    """Exit with what, error and advice after an error of these kinds."""
    try:
        yield
    except kinds as error:
        raise SystemExit(f"{what} ({brief(error)}); {advice}")


def kind_of(name):
    """Return a constant's type."""
    return RULES[name] if isinstance(RULES[name], type) else type(RULES[name][0])


def check_constant(name, value):
    """Raise ValueError unless value is as RULES says."""
    rule, kind, may_be_0 = RULES[name], kind_of(name), name != "LEARNING_RATE"
    tests = {
        str: ("a text", lambda: value.isprintable() and (value or name == "EVAL_FILE")),
        list: ("a list of names", lambda: value and all(type(n) is str and n for n in value)),
        int: ("int, from 1 to below 2**31", lambda: 0 < value < 2**31),
        float: ("float, from 0 to below 1", lambda: 0 <= value < 1 and (value or may_be_0)),
    }
    text, is_good = tests[kind] if rule is kind else (f"in {rule}", lambda: value in rule)
    is_kind = type(value) is kind or (kind is float and type(value) is int)
    if not (is_kind and is_good()):
        raise ValueError(f"{name} is {value!r}; it must be {text}")


def parse_args(argv=None):
    """Return the constants as flags change them; exit with 2 if one is bad."""
    usage = "%(prog)s [--CONSTANT VALUE ...]"
    parser = argparse.ArgumentParser(usage=usage, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for switch in ("--demo", "--dry_run", "--chat"):
        parser.add_argument(switch, action="store_true")
    parser.add_argument("--compare", nargs="+", metavar="DIR")
    try:
        for name in RULES:
            check_constant(name, globals()[name])
            how = {"nargs": "+"} if kind_of(name) is list else {"type": kind_of(name)}
            how |= {"default": globals()[name], "metavar": "VALUE", "help": "[%(default)s]"}
            parser.add_argument(f"--{name.lower()}", **how)
        args = parser.parse_args(argv)
        if args.demo:
            parser.set_defaults(**{name.lower(): value for name, value in DEMO.items()})
            args = parser.parse_args(argv)
        for name in RULES:
            check_constant(name, vars(args)[name.lower()])
        if args.publish == "best" and not args.eval_file:
            raise ValueError("PUBLISH 'best' needs an EVAL_FILE")
    except (KeyError, ValueError) as error:
        parser.error(str(error))
    return args


# ==== 3 Data: read, check every line, find repeats


def check_messages(messages):
    """Raise ValueError unless a list of messages is well-formed."""
    roles = []
    for number, message in enumerate(messages, 1):
        whole = isinstance(message, dict) and message.keys() == {"role", "content"}
        role, text = (message["role"], message["content"]) if whole else ("", "")
        is_text = isinstance(text, str) and text.strip() and not re.search("[\ud800-\udfff]", text)
        if role not in ("system", "user", "assistant") or not is_text:
            rule = "write only role (system, user, assistant) and content (no blank or surrogate)"
            raise ValueError(f"message {number} is {brief(repr(message), 80)}; {rule}")
        roles.append(role)
    if not re.fullmatch("s?(ua)+", "".join(role[0] for role in roles)):
        rule = "write at most one system, then user and assistant in turn"
        raise ValueError(f"the messages are {listed(roles, 6, ', ')}; {rule}")


def unique_keys(pairs):
    """Return a JSON object as a dictionary, or raise ValueError."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("an object has a key twice; remove it")
    return dict(pairs)


def parse_line(text):
    """Return a line's examples, one for each learnt reply; "reply" is its index."""
    row = json.loads(text, object_pairs_hook=unique_keys)
    keys = ("messages", "prompt", "completion")
    form = {key: type(row[key]) for key in keys if isinstance(row, dict) and key in row}
    if form not in ({"messages": list}, {"prompt": list, "completion": list}):
        rule = "write one list, messages, or two, prompt and completion"
        raise ValueError(f"no conversation, or two: {brief(repr(row), 80)}; {rule}")
    turns = [turn for key in form for turn in row[key]]
    check_messages(turns)
    replies = [n for n, turn in enumerate(turns) if turn["role"] == "assistant"]
    if "messages" in form:
        return [{"messages": turns, "reply": n} for n in replies]
    if len(row["completion"]) != 1:
        raise ValueError("completion has several messages; write the last one")
    return [{"messages": turns, "reply": replies[-1]}]


def read_examples(path):
    """Return a file's examples, "where" being path:line; exit with all bad lines."""
    examples, problems = [], []
    if not Path(path).is_file():  # a pipe cannot be read twice
        raise SystemExit(f"{path}: not a file; set TRAIN_FILE and EVAL_FILE to JSONL files")
    for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8-sig").strip()
            examples += [{"where": where} | one for one in (parse_line(text) if text else [])]
        except (ValueError, RecursionError) as error:  # json and decode(), too
            problems.append(f"{where}: {str(error).replace('line 1 ', '')}")
    if problems or not examples:
        advice = "write one JSON object a line, in UTF-8; README.md shows the forms"
        raise SystemExit(listed([listed(problems) or f"{path}: no examples", advice]))
    report("data", f"{path}: {len(examples):,} examples")
    return examples


def warn_of_repeats(train, held_out):
    """Print the held-out prompts that are trained on."""

    def prompt(row):
        return json.dumps(row["messages"][: row["reply"]], sort_keys=True)

    trained = {prompt(row): row["where"] for row in reversed(train)}
    same = [(row["where"], trained.get(prompt(row))) for row in held_out]
    notes = [f"{a} has the prompt of {b}; it tests nothing new" for a, b in same if b]
    if notes:
        report("warning", listed([*dict.fromkeys(notes)]))


# ==== 4 Device, model: the processes, the GPU, config and tokenizer


def check_device(args):
    """Return the device's name, or exit; to be called before transformers is used."""
    # The processes of `accelerate launch` meet.
    accelerate.PartialState(cpu=args.device == "cpu")
    if args.device == "cpu":
        return "CPU"
    driver = "no NVIDIA driver"
    with suppress(OSError):
        driver = brief(Path("/proc/driver/nvidia/version").read_text(), 90)
    found = f"{driver}; CUDA_VISIBLE_DEVICES={os.getenv('CUDA_VISIBLE_DEVICES')}"
    advice = f"{found}; driver 525 or newer is needed (README.md), or --demo or --device cpu"
    with blame("DEVICE cuda: torch sees no GPU", advice, RuntimeError, AssertionError):
        torch.cuda.init()  # says why
    major, minor = torch.cuda.get_device_capability()
    name = f"{torch.cuda.get_device_name()}, sm_{major}{minor}"
    if major < 8:  # fla does not support it, yet transformers would use it
        sys.modules["fla"] = sys.modules["causal_conv1d"] = None
    advice = 'pip install "torch>=2.7,<2.11", for sm_70 (V100) to sm_120, or free its memory'
    # A wheel without this GPU's kernels says so only here.
    with blame(f"DEVICE cuda: torch does not run on {name}", advice, RuntimeError):
        ones = torch.ones(8, 8, device="cuda", dtype=getattr(torch, args.dtype))
        (ones @ ones).sum().item()
    return name


def load_config_and_tokenizer(args):
    """Return MODEL_NAME's (config, tokenizer), or exit; a branch becomes its commit."""
    from huggingface_hub import resolve_revision

    name, what = args.model_name, f"MODEL_NAME {args.model_name}: "
    advice = "check the name, the folder or the network"
    with blame(what + "no model", advice, Exception):
        if not Path(name).is_dir():  # from_pretrained alone retries for 25 s
            args.model_revision = resolve_revision(name, revision=args.model_revision).resolved
        chosen = {"revision": args.model_revision, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(name, **chosen)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **chosen)
    if not tokenizer.chat_template or tokenizer.eos_token_id is None or len(tokenizer) < 256:
        raise SystemExit(f"{what}no tokenizer, chat template or end of turn; use a chat model")
    if "quantization_config" in config.to_json_string():
        raise SystemExit(f"{what}quantized; use the model that it was made from")
    return config, tokenizer


# ==== 5 Tokens: what the model sees, and what of it is learnt


SERVED = {"enable_thinking": False, "return_dict": False}  # how a conversation is rendered


def render(example, tokenizer):
    """Return the token ids of the prompt and of the reply, or raise ValueError."""
    from jinja2 import TemplateError

    conversation = example["messages"][: example["reply"] + 1]
    text = "\n".join(message["content"] for message in conversation)
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and str(token) in text:
            raise ValueError(f"the text holds the control token {token}; respell or remove it")
    to_ids = partial(tokenizer.apply_chat_template, **SERVED)
    try:
        prompt = to_ids(conversation[:-1], add_generation_prompt=True)
        whole = to_ids(conversation)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it ({error}); change the conversation")
    reply, end = whole[len(prompt) :], tokenizer.eos_token_id
    if prompt + reply != whole or end not in reply:
        fault = f"rendered otherwise with its reply, or without {tokenizer.eos_token}"
        raise ValueError(f"{fault}: training would not equal serving. Is there a think tag?")
    return prompt, reply[: reply.index(end) + 1]  # without the template's newline


def encode(examples, tokenizer, max_seq_len):
    """Return examples with input_ids and labels (-100: not learnt); leave out too long ones."""
    rows, problems, too_long = [], [], []
    for example in examples:
        try:
            prompt, reply = render(example, tokenizer)
        except ValueError as error:
            problems.append(f"{example['where']}: {error}")
            continue
        ids, labels = prompt + reply, [-100] * len(prompt) + reply
        if len(ids) > max_seq_len:  # cut, it would teach not to stop
            too_long.append(f"{example['where']}: {len(ids):,} tokens, over MAX_SEQ_LEN; raise it")
        else:
            rows.append(example | {"input_ids": ids, "labels": labels})
    if len(too_long) > len(examples) / 10:
        problems += too_long
    if problems:
        raise SystemExit(listed(problems))
    if too_long:
        report("left out", listed(too_long))
    return rows


def report_tokens(files):
    """Print the lengths in tokens of {path: rows}; return hashes and counts."""
    lines, facts = ["file                     examples  median   max     tokens     trained"], {}
    for path, rows in [(path, rows) for path, rows in files.items() if rows]:
        n = [len(row["input_ids"]) for row in rows]
        trained = sum(n) - sum(row["labels"].count(-100) for row in rows)
        line = f"{path:<24}{len(n):>9,}{statistics.median(n):>8,.0f}{max(n):>6,}{sum(n):>11,}"
        lines.append(f"{line}{trained:>12,} ({trained / sum(n):.0%})")
        facts[path] = {"examples": len(n), "tokens": sum(n), "trained_tokens": trained}
        facts[path]["sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    report("tokens", "\n".join(lines))
    return facts


def show_example(row, tokenizer):
    """Print a row as the model sees it."""
    ids, start = row["input_ids"], row["labels"].count(-100)
    text = f"{tokenizer.decode(ids[:start])}>>>{tokenizer.decode(ids[start:])}<<<"
    lines = [f"{row['where']} as the model sees it; only what is in >>> <<< is trained"]
    lines += [textwrap.fill(line, 90) for line in text.split("\n")]
    report("example", "\n".join(lines))


# ==== 6 Plan and Job: targets, the LoRA table, steps


# trainable, total: parameters of LoRA, of all; largest: (d, k) of the largest module.
Plan = namedtuple("Plan", "trainable total steps_per_epoch steps largest")


@dataclass
class Job:
    """What run() finds out, step by step."""

    args: argparse.Namespace
    config: object = None
    tokenizer: object = None
    train: list = ()
    eval: list = ()
    data: dict | None = None
    device: str = ""
    plan: Plan | None = None
    products: dict | None = None
    checkpoint: Path | None = None  # to go on from
    started: float = 0.0
    history: list = ()  # what the trainer logged
    learnt: dict | None = None
    seconds: float = 0.0  # of steps, since the checkpoint
    tokens: int = 0  # read in them
    peak_gib: float = 0.0
    is_training: bool = False
    published: str = ""  # which epoch final_lora is of
    stopped_by: int = 0

    def losses(self, key):
        """Return {step: loss} of "loss" or "eval_loss", the first of which is the base's."""
        return {entry["step"]: entry[key] for entry in self.history if key in entry}

    @property
    def output(self):
        """The results' folder."""
        return Path(self.args.output_dir)


def linear_modules(config):
    """Return {(name, parent, d, k): layers} of linear modules, and the parameters' number."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    found = {}
    for path, module in model.named_modules():
        at = re.search(r"\.(\d+)\.(?:.+\.)?(\w+)\.(\w+)$", path)
        if at and isinstance(module, torch.nn.Linear):
            found.setdefault((at[3], at[2], *module.weight.shape), set()).add(at[1])
    return found, model.num_parameters()


def make_plan(args, config, n_train):
    """Print what will be trained; return its counts, from the config alone."""
    linear, total = linear_modules(config)
    targets, names = [*dict.fromkeys(args.lora_target_modules)], sorted({key[0] for key in linear})
    # PEFT is silent about these as long as another target matches.
    if unknown := [target for target in targets if target not in names]:
        have = ", ".join(names) or "no nn.Linear: another model is needed"
        fault = f"no layer has {', '.join(unknown)}; the layers have {have}"
        raise SystemExit(f"LORA_TARGET_MODULES: {fault}")
    depth = config.get_text_config().num_hidden_layers
    r, trainable, attention = args.lora_r, 0, []
    scale = f"scale alpha/r = {args.lora_alpha / r:g}, dropout {args.lora_dropout:g}"
    columns = "{:<12}{:<17}{:>14}{:>11}{:>11}{:>14}".format
    heads = columns("target", "in layers", "W (frozen)", "A", "B", "parameters")
    lines = [f"r={r} alpha={args.lora_alpha}, {scale}", heads]
    for target in targets:
        for (_, parent, d, k), layers in [item for item in linear.items() if item[0][0] == target]:
            count = len(layers) * r * (d + k)
            trainable += count
            attention += [target] * (parent == "self_attn")
            shapes = f"{d}x{k}", f"{r}x{k}", f"{d}x{r}"
            lines.append(columns(target, f"{len(layers)}/{depth} {parent}", *shapes, f"{count:,}"))
    total += trainable
    share = f"trainable%: {100 * trainable / total:.4f}"
    lines.append(f"trainable params: {trainable:,} || all params: {total:,} || {share}")
    deltanet = {n for key, layers in linear.items() if key[1] == "linear_attn" for n in layers}
    if deltanet and attention:
        kind = f"{len(deltanet)} of {depth} layers are Gated DeltaNet"
        lines.append(f"{kind}, without {', '.join(attention)}")
    size, accumulated = args.batch_size, args.gradient_accumulation_steps
    per_epoch = math.ceil(n_train / (size * accumulated))
    steps = per_epoch * args.num_epochs
    formula = f"ceil({n_train:,} / ({size} x {accumulated})) x {args.num_epochs}"
    lines.append(f"{steps:,} steps, {per_epoch:,} an epoch: {formula}")
    report("plan", "\n".join(lines))
    largest = max(((d, k) for _, _, d, k in linear), key=math.prod)
    return Plan(trainable, total, per_epoch, steps, largest)


def check_shares(job):
    """Exit if processes cannot share evenly: accelerate would repeat examples."""
    n, size = accelerate.PartialState().num_processes, job.args.batch_size
    odd = job.args.gradient_accumulation_steps % n or len(job.train) % (n * size)
    if n > 1 and (odd or len(job.eval) % size):
        rule = f"GRADIENT_ACCUMULATION_STEPS a multiple of {n}, training examples of {n * size}"
        raise SystemExit(f"{n} processes: make {rule}, held-out ones of {size}")
    job.device += f", {n} processes" * (n > 1)


# ==== 7 Matrix products in float16, where bfloat16 is emulated


def scaled_product(rows, weight):
    """Return rows (... x k) @ weight (k x d), multiplied in float16, in the dtype of rows.

    Each row is divided by a power of two: that is exact, and its largest number, now below 2, is
    within float16's range. Infinity and NaN stay in their rows.
    """
    largest = torch.linalg.vector_norm(rows, math.inf, -1, keepdim=True, dtype=torch.float32)
    largest = largest.clamp(1e-37, 1e38)  # not 0, not infinity
    power = largest / torch.frexp(largest).mantissa
    small = (rows / power).half().contiguous()
    return (small @ weight * power).to(rows.dtype)


def use_float16(model):
    """Have the frozen linear modules compute by scaled_product(), where that is safe."""

    class Product(torch.autograd.Function):
        """rows @ weight.T, with a gradient of rows alone."""

        @staticmethod
        def forward(context, rows, weight):
            context.weight = weight
            return scaled_product(rows, weight.T)

        @staticmethod
        def backward(context, gradient):
            return scaled_product(gradient, context.weight), None

    def forward(module, rows):
        product = Product.apply(rows, module.weight)
        return product if module.bias is None else product + module.bias

    dtype, left = model.dtype, []
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            parts = module.weight.data.split(4096)  # for less memory
            sums = [part.float().abs().sum(1).max() for part in parts]
            sums.append(sum(part.float().abs().sum(0) for part in parts).max())
            # Inputs are below 2, float16 below 65504. forward adds W's rows, backward its columns.
            if all(one < 65504 / 2 for one in sums):
                module.weight.data = module.weight.data.half()
                module.forward = partial(forward, module)
            else:
                left.append(name)
    # The embedding may share the head's weight, now float16.
    model.get_input_embeddings().register_forward_hook(lambda _, ids, rows: rows.to(dtype))
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False  # float32 sums
    but = f", except {listed(left, 3, ', ')}" * bool(left)
    report("products", f"the frozen modules compute in scaled float16{but}")


def choose_products(job):
    """Return {"used": "float16" or "dtype"}, as PRODUCTS says or what is clearly faster."""
    args, (d, k), rates = job.args, job.plan.largest, {}
    used = args.products.replace("auto", "dtype")
    if args.products != "auto" or args.device == "cpu":
        return {"used": used}
    n = math.ceil(args.batch_size * statistics.median(len(row["input_ids"]) for row in job.train))
    like = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    try:
        from torch.utils.benchmark import Timer

        rows, weight = torch.randn(n, k, **like), torch.randn(d, k, **like)
        half = weight.half()
        kinds = {"dtype": lambda: rows @ weight.T, "float16": lambda: scaled_product(rows, half.T)}
        for kind, product in kinds.items():
            timer = Timer("product()", globals={"product": product})
            rates[kind] = 2e-12 * n * d * k / timer.blocked_autorange().median
    except (ImportError, RuntimeError) as fault:
        report("products", f"in {args.dtype}: scaled float16 fails here ({brief(fault)})")
        return {"used": used}
    if rates["float16"] > 1.2 * rates["dtype"]:
        used = "float16"
    text = "{dtype:.1f} TFLOP/s in {}, {float16:.1f} in scaled float16".format(args.dtype, **rates)
    report("products", f"{text}: {used} is used")
    return {"used": used, "tflops": rates}


# ==== 8 Run folder: what an earlier run left, its checkpoint, run.json


def open_log(output):
    """Lock output; log there what report() says, warnings and tracebacks."""
    with blame(f"OUTPUT_DIR {output}", "choose a folder to write in", OSError):
        output.mkdir(parents=True, exist_ok=True)
        log = logging.FileHandler(output / "all_logs.log", encoding="utf-8")
    what = f"OUTPUT_DIR {output}: another run writes there"
    # Other errors: a network file system without locks.
    with suppress(OSError), blame(what, "choose another folder", BlockingIOError):
        fcntl.flock(log.stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    logging.basicConfig(handlers=[log, logging.lastResort], format="%(message)s", force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk
    LOG.setLevel(logging.INFO)
    LOG.info("\n---- %s %s", time.strftime("%F %T"), sys.argv)


def set_aside(path):
    """Rename what an earlier run left at path."""
    if path.exists():
        aside = f"{path}.{time.strftime('%F-%H%M%S', time.localtime(path.stat().st_mtime))}"
        while os.path.exists(aside):
            aside += "+"
        path.rename(aside)
        report("moved", f"{path} of an earlier run to {aside}")


def write_json(path, value):
    """Write value so that path never holds half of it."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(value, indent=1), "utf-8")
    new.replace(path)


def hashes(folder):
    """Return each file's SHA-256, but for complete.json."""
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
    with suppress(OSError, ValueError, AttributeError):  # complete.json may be cut too
        written = json.loads((checkpoint / "complete.json").read_bytes())
        return written.items() <= hashes(checkpoint).items()
    return False


def prune(folder, per_epoch, newest):
    """Keep the newest checkpoints whole; of the older ones each epoch's adapter alone."""
    saved = checkpoints_in(folder)
    for step in [*saved][: len(saved) - newest]:
        if step % per_epoch:
            shutil.rmtree(saved[step])
            continue
        for path in saved[step].iterdir():
            if path.is_file() and not path.name.startswith("adapter_"):
                path.unlink()


def find_checkpoint(job):
    """Return this job's newest complete checkpoint; exit at another's; else begin a folder."""
    folder, model, before = job.output / "checkpoints", Path(job.args.model_name), None
    now = {name: vars(job.args)[name.lower()] for name in JOB_RULES}
    now["PRODUCTS"] = job.products["used"]
    content = {
        "MODEL_NAME's files": hashes(model) if model.is_dir() else {},  # or a commit
        "TRAIN_FILE's tokens": [row["input_ids"] for row in job.train],
        "EVAL_FILE's tokens": [row["input_ids"] for row in job.eval],
    }
    for name, value in content.items():
        now[name] = hashlib.sha256(repr(value).encode()).hexdigest()[:16]
    with suppress(OSError, ValueError):
        before = json.loads((folder / "job.json").read_bytes())
    complete = [path for path in checkpoints_in(folder).values() if is_complete(path)]
    if before and complete:
        differ = [name for name in before | now if before.get(name) != now.get(name)]
        if not differ:
            report("resume", f"from {complete[-1]}")
            return complete[-1]
        rows = [f"  {name} was {before.get(name)}, is {now.get(name)}" for name in differ]
        fault = f"OUTPUT_DIR {job.output} holds {complete[-1].name} of another job"
        advice = "set these back to go on, or choose another OUTPUT_DIR"
        raise SystemExit(listed([f"{fault}; {advice}:", *rows]))
    if checkpoints_in(folder):  # published or broken
        set_aside(folder)
    set_aside(job.output / "run.json")
    folder.mkdir(exist_ok=True)
    write_json(folder / "job.json", now)


def write_record(job, outcome):
    """Write run.json, if the run has started."""
    try:
        if job.started and is_first():
            installed = reversed([*importlib.metadata.distributions()])  # first wins
            write_json(job.output / "run.json", {
                "outcome": outcome, "started": job.started,
                "versions": {one.name: one.version for one in installed},
                "constants": {name: vars(job.args)[name.lower()] for name in RULES},
                "device": job.device, "data": job.data, "plan": job.plan._asdict(),
                "products": job.products, "resumed_from": job.checkpoint and str(job.checkpoint),
                "train_seconds": job.seconds, "tokens": job.tokens, "learnt": job.learnt,
                "peak_memory_gib": job.peak_gib, "published": job.published,
                "loss_history": job.history,
            })  # fmt: skip
    except OSError as error:
        report("warning", f"{job.output}/run.json is not written: {error}")


# ==== 9 Trainer: its configuration, loss, injection, memory


def sft_config(job):
    """Return TRL's configuration; its defaults: AdamW without decay, clipping at 1."""
    args, n_processes = job.args, accelerate.PartialState().num_processes
    return trl.SFTConfig(
        output_dir=f"{job.output}/checkpoints", seed=args.seed,
        num_train_epochs=args.num_epochs, per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps // n_processes,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate, lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=int(args.warmup_ratio * job.plan.steps),
        bf16=False,  # no autocast: gradients are no better with it (tests/benchmark.py)
        activation_checkpointing=False,  # fit_memory() chooses
        # TRL must not render, cut or pack: packed, DeltaNet's state would leak between rows.
        dataset_kwargs={"skip_prepare_dataset": True},
        eval_strategy="epoch" if job.eval else "no",
        eval_on_start=bool(job.eval) and not job.checkpoint,  # B is zero then: the base's loss
        save_strategy="epoch",  # on_step_end() saves between
        disable_tqdm=True, use_cpu=args.device == "cpu", ddp_find_unused_parameters=False,
        logging_steps=1,  # each loss is checked and kept
        include_num_input_tokens_seen="non_padding",
        logging_nan_inf_filter=False,  # True puts a mean in the place of a NaN loss
        eos_token=job.tokenizer.eos_token,
    )  # fmt: skip


def load_model(args):
    """Return the text model in DTYPE; exit unless its files hold all tensors."""
    what = f"MODEL_NAME {args.model_name}: "
    advice = "whole safetensors files are needed; run again to go on loading"
    with blame(what + "no weights", advice, Exception):
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            args.model_name, revision=args.model_revision, dtype=args.dtype,
            trust_remote_code=False, use_safetensors=True,  # no code, no pickle
            output_loading_info=True,
        )  # fmt: skip
    if missing := sorted(found["missing_keys"]):  # filled with random numbers
        raise SystemExit(f"{what}the files lack {listed(missing, 3, ', ')}")
    return model


def token_loss(model, inputs, num_items_in_batch=None, **_):
    """Return the sum of -log(probability) over learnt tokens / their number in the whole step.

    This is TRL's loss without Triton. Logits are made only where a token is learnt, by the
    model's own head, which may be float16.
    """
    labels = inputs["labels"][:, 1:]
    learnt = labels != -100
    kept = learnt.any(0).nonzero()[:, 0]  # positions whose next token is learnt, in any row
    logits = model(**{**inputs, "labels": None, "logits_to_keep": kept}).logits.flatten(0, 1)
    wanted = labels[:, kept].flatten()
    total = torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")
    if num_items_in_batch is None:  # in an evaluation
        return total / learnt.sum()
    # It counts all processes; DDP takes their mean.
    return total * accelerate.PartialState().num_processes / num_items_in_batch


def build_trainer(job):
    """Return the SFTTrainer; LoRA is injected by it alone."""
    args, by_length = job.args, sorted(job.eval, key=lambda row: len(row["input_ids"]))
    model = load_model(args)
    if job.products["used"] == "float16":
        use_float16(model)
    trainer = trl.SFTTrainer(
        model=model,
        peft_config=peft.LoraConfig(  # change make_plan() with it
            r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules, task_type="CAUSAL_LM",
            revision=args.model_revision,
        ),
        args=sft_config(job),
        train_dataset=datasets.Dataset.from_list(job.train),
        eval_dataset=datasets.Dataset.from_list(by_length) or None,
        processing_class=job.tokenizer,
    )  # fmt: skip
    trainer.compute_loss = token_loss
    # Like lengths need less padding; group_by_length would order a resumed run anew.
    # One replica: accelerate deals batches to processes.
    n = args.batch_size * args.gradient_accumulation_steps
    alone = {"num_replicas": 1, "rank": 0, "seed": args.seed}
    sampler = transformers.trainer_pt_utils.DistributedLengthGroupedSampler(n, job.train, **alone)
    if job.checkpoint:  # else it begins in the first epoch's order
        sampler.set_epoch(int(job.checkpoint.name[11:]) // job.plan.steps_per_epoch)
    trainer._get_train_sampler = lambda dataset=None: sampler
    # By default PEFT asks the hub at each save.
    save = trainer.model.save_pretrained
    trainer.model.save_pretrained = partial(save, save_embedding_layers=False)
    trainer.create_model_card = lambda **_: None  # TRL's describes no run
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def check_injection(model, plan):
    """Exit unless LoRA's float32 weights alone are trainable, as planned."""
    counts, odd = model.get_nb_trainable_parameters(), []
    for name, p in model.named_parameters():
        if p.requires_grad != ("lora_" in name) or (p.requires_grad and p.dtype != torch.float32):
            odd.append(f"{name} in {p.dtype}")
    found = "{:,} of {:,} parameters are trainable".format(*counts)
    if odd or counts != plan[:2]:
        planned = "planned were {:,} of {:,}".format(*plan)
        raise SystemExit(listed([f"LoRA is not injected as planned: {found}, {planned}", *odd]))
    report("model", f"{found}, LoRA's alone, in float32, as planned")


def fit_memory(trainer, job):
    """Recompute activations, 45 % more work, only for batches that do not fit in memory."""
    model, size = trainer.model, job.args.batch_size
    model.activation_checkpointing_enable()
    model.disable_input_require_grads()  # recomputation needs no gradient of embeddings
    kind = transformers.modeling_layers.GradientCheckpointingLayer
    layers = [module for module in model.modules() if isinstance(module, kind)]
    limit = math.inf  # tokens of a batch, up to which activations are kept

    def recompute_if_large(_, __, inputs):
        for layer in layers:
            layer.gradient_checkpointing = inputs["input_ids"].numel() > limit

    def overflows(rows):
        inputs = trainer.data_collator(rows)
        inputs["labels"] = inputs["input_ids"]  # as if all were learnt: the most memory
        try:
            trainer.training_step(model, inputs, 1)
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
    share = (free + torch.cuda.memory_reserved()) / total
    # A tenth is for the optimizer's states and for fragmentation.
    torch.cuda.set_per_process_memory_fraction(0.9 * share)
    rows = sorted(job.train, key=lambda row: len(row["input_ids"]))
    batches = [rows[n : n + size] for n in range(max(1, len(rows) - size + 1))]
    longest = batches[-1]
    if overflows(longest):
        # Batches grow longer: bisect; the first n_fit fit.
        n_fit = bisect.bisect_left(batches, True, key=overflows)
        limit = size * len(batches[n_fit - 1][-1]["input_ids"]) if n_fit else 0
        if overflows(longest):  # recomputed
            raise torch.OutOfMemoryError("the longest batch does not fit")
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.reset_peak_memory_stats()
    transformers.set_seed(job.args.seed)
    which = "all batches" if limit == math.inf else f"batches of up to {limit:,} tokens"
    report("memory", f"activations are kept for {which}, else recomputed")


# ==== 10 Training: what is printed and saved


class Callbacks:
    """A run's callbacks; train() adds job, and transformers' base class."""

    def on_step_begin(self, _, state, *__, **___):
        """From here on a signal waits for the end of the step."""
        self.job.is_training = True
        self.began, self.seen = time.monotonic(), state.num_input_tokens_seen

    def on_log(self, _, state, __, logs, **___):
        """Print a loss, and exit if it is not finite."""
        job, step = self.job, state.global_step
        job.history = state.log_history
        for key in ("loss", "grad_norm", "eval_loss"):
            if not math.isfinite(logs.get(key, 0)):
                fault = f"train: {key} is {logs[key]} at step {step}"
                advice = "lower LEARNING_RATE, set DTYPE to float32, or check the base's weights"
                raise SystemExit(f"{fault}; {advice}")
        if "eval_loss" in logs:
            report("eval", f"epoch {state.epoch or 0:g}  loss {logs['eval_loss']:.4f}")
        if "loss" in logs:
            job.seconds += time.monotonic() - self.began
            job.tokens += state.num_input_tokens_seen - self.seen
            if step % job.args.logging_steps == 0:
                text = "loss {loss:.4f}  gradient norm {grad_norm:.3f}  learning rate "
                text += f"{{learning_rate:.2e}}  {job.tokens / job.seconds:,.0f} tokens/s"
                report("train", f"step {step:,}/{state.max_steps:,}  {text.format(**logs)}")

    def signal_heard(self):
        """Return the signal that any process was sent, or 0; all of them are asked at once."""
        return max(accelerate.utils.gather_object([self.job.stopped_by]))

    def on_step_end(self, _, state, control, **__):
        """Save after SAVE_STEPS steps or a signal."""
        job, step = self.job, state.global_step
        is_due = self.signal_heard() > 0 or step % job.args.save_steps == 0
        # An epoch's last step is saved after its evaluation, which moves the random state.
        control.should_save = is_due and step % job.plan.steps_per_epoch > 0

    def on_save(self, _, state, *__, **___):
        """Mark a checkpoint as complete, prune the older ones; stop here after a signal."""
        job, step, folder = self.job, state.global_step, self.job.output / "checkpoints"
        new = folder / f"checkpoint-{step}"
        accelerate.PartialState().wait_for_everyone()  # each writes its random state
        if is_first():
            write_json(new / "complete.json", hashes(new))
            prune(folder, job.plan.steps_per_epoch, newest=2)
        job.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        job.is_training = step < job.plan.steps
        if number := self.signal_heard():
            done = f"stopped at step {step:,} of {job.plan.steps:,}"
            raise KeyboardInterrupt(number, f"{done}; the same command goes on from {new}")


def train(trainer, job):
    """Train to the end; on_save() raises KeyboardInterrupt(signal, message)."""
    callbacks = type("Callbacks", (Callbacks, transformers.TrainerCallback), {"job": job})
    trainer.add_callback(callbacks())
    trainer.train(resume_from_checkpoint=job.checkpoint)


# ==== 11 Results: the adapter, its proof, and what shows what it does


def save_adapter(model, job, folder):
    """Write folder/final_lora, and final_lora_vllm if vLLM needs it."""
    final, vllm = folder / "final_lora", folder / "final_lora_vllm"
    model.save_pretrained(final)
    job.tokenizer.save_pretrained(final)
    tensors = safetensors.load_file(final / "adapter_model.safetensors")
    plain, wrapped = ".model.model.", ".model.model.language_model."
    is_wrapper = job.config.get_text_config() is not job.config
    if is_wrapper and not any(wrapped in name for name in tensors):
        # Up to 0.32 vLLM accepts a wrapper's adapter under other names, and serves the base.
        vllm.mkdir()
        shutil.copy(final / "adapter_config.json", vllm)
        renamed = {name.replace(plain, wrapped, 1): tensor for name, tensor in tensors.items()}
        safetensors.save_file(renamed, vllm / "adapter_model.safetensors", {"format": "pt"})
    # Written for their owner alone; a server may be another user.
    for path in folder.glob("*/*.safetensors"):
        shutil.copymode(final / "adapter_config.json", path)


def prove(model, folder, row):
    """Return model with its adapter from disk; exit unless tensors and logits are the same.

    A GPU may round: a tenth of the effect is allowed.
    """
    kept = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    saved = safetensors.load_file(folder / "adapter_model.safetensors")
    odd = kept.keys() ^ saved.keys()
    for name in kept.keys() & saved.keys():
        if not (saved[name].any() and saved[name].equal(kept[name].cpu())):
            odd.add(name)
    if odd:
        names = listed(sorted(odd), 3, ", ")
        raise SystemExit(f"proof: in {folder} not as trained, not numbers or all zero: {names}")
    ids = torch.tensor([row["input_ids"]], device=model.device)
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        reloaded = peft.PeftModel.from_pretrained(model.unload(), folder)

        def distance():
            return (reloaded(input_ids=ids).logits - trained).abs().max().item()

        error = distance()
        with reloaded.disable_adapter():
            effect = distance()
    found = f"reloaded from disk, its logits differ by {error:.2g} from the trained model's"
    found += f", by {effect:.2g} from the base's"
    if not (effect > 0 and error <= effect / 10):
        raise SystemExit(f"proof: {folder}: {found}; the adapter does not work")
    report("proof", found)
    return reloaded


def measure_update(model):
    """Return {target: [a row for each layer]}: the size of its update, the directions used.

    B = Q R and A^T = Q' R', and Q and Q' change no length: R R'^T, r x r numbers, has the
    singular values of B A, d x k.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            a, b = (part["default"].weight.double() for part in (module.lora_A, module.lora_B))
            product = torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T
            energy = torch.linalg.svdvals(module.scaling["default"] * product).square()
            total = energy.sum().item()
            weight = torch.linalg.vector_norm(module.get_base_layer().weight, dtype=torch.float64)
            row = {
                "layer": int(re.search(r"\.(\d+)\.", name)[1]),
                "directions": int((energy.cumsum(0) < 0.9 * total).sum()) + bool(total),
                "update": math.sqrt(total) / weight.item(),
                "half": energy[: max(1, len(a) // 2)].sum().item() / (total or 1),
            }
            found.setdefault(name.rpartition(".")[2], []).append(row)
    return found


def report_learnt(model, job, _):
    """Print what LoRA learnt, as means over each target's layers."""
    job.learnt, r = measure_update(model), job.args.lora_r
    columns = "{:<14}{:>10}{:>18}{:>14}{:>22}".format
    held = f"strongest {max(1, r // 2)} hold"
    lines = [columns("target", "update/W %", "most in layers", "directions", held)]
    for target, rows in job.learnt.items():
        most = sorted(rows, key=lambda row: -row["update"])[:3]
        layers = ", ".join(str(row["layer"]) for row in most)
        keys = ("update", "directions", "half")
        update, used, half = (statistics.fmean(row[key] for row in rows) for key in keys)
        shown = f"{100 * update:.3g}", layers, f"{used:.1f} of {r}", f"{half:.0%}"
        lines.append(columns(target, *shown))
    lines.append("directions hold 90 % of the update; few are usual, and no sign of too large an r")
    report("learnt", "\n".join(lines))


def publish(trainer, job):
    """Write the adapter beside its place, prove it, move it in; return it."""
    staging, folder = job.output / ".partial", job.output / "checkpoints"
    shutil.rmtree(staging, ignore_errors=True)
    evals, step = job.losses("eval_loss"), job.plan.steps
    if job.args.publish == "best":
        step = min([*evals][1:], key=evals.get)
        best = safetensors.load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")
        peft.set_peft_model_state_dict(trainer.model, best)
    try:
        save_adapter(trainer.model, job, staging)
        model = prove(trainer.model, staging / "final_lora", (job.eval or job.train)[0])
        for name in ("final_lora", "final_lora_vllm", "samples.md", "lora.png"):
            set_aside(job.output / name)
        for new in staging.iterdir():
            new.rename(job.output / new.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    job.published = f"of epoch {step // job.plan.steps_per_epoch} of {job.args.num_epochs}"
    (folder / "job.json").unlink(missing_ok=True)  # the next run starts anew
    prune(folder, job.plan.steps_per_epoch, newest=0)
    return model


def answer(model, job, prompt, streamer=None):
    """Return the greedy reply to a prompt's ids; one that is not streamed is marked if cut."""
    ids, eos = torch.tensor([prompt], device=model.device), job.tokenizer.eos_token_id
    how = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=job.args.max_new_tokens,
        eos_token_id=eos, pad_token_id=job.tokenizer.pad_token_id,
    )  # fmt: skip
    out = model.generate(ids, how, attention_mask=torch.ones_like(ids), streamer=streamer)
    reply = out[0, len(prompt) :].tolist()
    cut = "" if streamer or eos in reply else " [cut here]"
    return job.tokenizer.decode(reply, skip_special_tokens=True) + cut


def write_samples(model, job, path):
    """Write held-out prompts and their replies: base's, adapter's, written."""
    args, count = job.args, min(job.args.num_samples, len(job.eval))
    text = f"# {args.model_name} with and without r={args.lora_r} alpha={args.lora_alpha}; greedy\n"
    for i in range(count):
        row = job.eval[i * len(job.eval) // count]
        *said, written = [(m["role"], m["content"]) for m in row["messages"][: row["reply"] + 1]]
        prompt = row["input_ids"][: row["labels"].count(-100)]
        with model.disable_adapter():
            said.append(("base", answer(model, job, prompt)))
        said += [("adapter", answer(model, job, prompt)), ("written", written[1])]
        text += f"\n## {row['where']}\n"
        for who, reply in said:
            quoted = "\n".join(f"> {line}" for line in reply.strip().splitlines())
            text += f"\n**{who}**\n\n{quoted}\n"
    if count:
        path.write_text(text, "utf-8")
        report("samples", f"{count} prompts with and without the adapter: {path}")


def draw(_, job, path):
    """Draw the losses, the updates' sizes and the directions that they use."""
    from matplotlib.figure import Figure

    args, text = job.args, job.config.get_text_config()
    title = f"{args.model_name}, r={args.lora_r} alpha={args.lora_alpha}, {job.published}"
    figure = Figure((11, 8), dpi=120, layout="constrained")
    losses, updates, used = figure.subplot_mosaic("aaaa;bbbc").values()
    for key, look in {"loss": "-", "eval_loss": "ko"}.items():
        points = job.losses(key)
        losses.plot([*points], [*points.values()], look, label=key)
    losses.set(xlabel="step", ylabel="loss, nats per token")
    losses.set_title(title, parse_math=False)
    losses.legend()
    kinds = text.to_dict().get("layer_types") or [""] * text.num_hidden_layers
    sizes = [[math.nan] * len(kinds) for _ in job.learnt]
    for n, rows in enumerate(job.learnt.values()):
        for row in rows:
            sizes[n][row["layer"]] = 100 * row["update"]
        used.barh(n, statistics.fmean(row["directions"] for row in rows), color="gray")
    image = updates.imshow(sizes, aspect="auto", vmin=0)
    updates.patch.set(hatch="xx", edgecolor="silver")  # where no module is
    figure.colorbar(image, ax=updates, label="norm of the update, % of W's norm")
    marks = [f"{n}\nD" if kind == "linear_attention" else n for n, kind in enumerate(kinds)]
    updates.set_xticks(range(len(kinds)), marks, fontsize=7)
    updates.set_yticks(range(len(sizes)), job.learnt)
    updates.set_xlabel("layer (D: Gated DeltaNet; hatched: no such module)")
    used.sharey(updates)
    used.set(xlim=(0, args.lora_r), xlabel="directions that\nhold 90 % of it")
    figure.savefig(path)
    report("picture", str(path))


def read_run(path):
    """Return a run.json with the loss of what was published, and a line about it."""
    run = json.loads(path.read_bytes())
    evals = [entry["eval_loss"] for entry in run["loss_history"] if "eval_loss" in entry]
    lowest = min(evals[1:])  # the first is the base's
    loss = lowest if run["constants"].get("PUBLISH") == "best" else evals[-1]
    figures = f"{loss:>9.4f}{lowest:>9.4f}{run['train_seconds'] / 60:>9.1f}"
    figures += "+" if run["resumed_from"] else " "  # more before a stop
    started, files = float(run["started"]), [*run["data"].values()]
    return run | {"loss": loss, "line": f"{figures} {path}", "started": started, "files": files}


def report_runs(folders, least):
    """Print the finished runs on the newest one's data, best first; return their number."""
    runs, paths = [], {path for folder in folders for path in Path(folder).glob("run.json*")}
    for path in paths:
        with suppress(Exception):
            run = read_run(path)
            runs += [run] * (run["outcome"] == "finished")
    newest = max(runs, key=lambda run: run["started"], default=None)
    same = [run for run in runs if run["files"] == newest["files"]]
    same.sort(key=lambda run: run["loss"])
    names = [*JOB_RULES, "PUBLISH"]
    differ = [name for name in names if len({str(run["constants"].get(name)) for run in same}) > 1]
    head = "eval loss   lowest  minutes  run, and what differs"
    lines = [f"{head} ({len(same)} of {len(paths)}: finished, on the newest's data)"]
    for run in same:
        values = [f"{name} {run['constants'].get(name)}" for name in differ]
        lines.append("  ".join([run["line"], *values]))
    if len(same) >= least:
        report("runs", listed(lines, 9))
    return len(same)


def write_extras(model, job):
    """Show what the adapter learnt and does; an error in it is a warning."""
    extras = {"learnt": report_learnt, "samples.md": write_samples, "lora.png": draw}
    for name, write in extras.items():
        try:
            write(model, job, job.output / name)
        except Exception as error:
            LOG.info(name, exc_info=True)
            report("warning", f"{name} is not written ({error!r}); the adapter is whole")


def summarize(job):
    """Print what was done and what to do next."""
    args, output = job.args, job.output
    losses = [*job.losses("eval_loss").values()]
    shown = " -> ".join(f"{loss:.4f}" for loss in losses) or "not evaluated"
    minutes, rate = (time.time() - job.started) / 60, job.tokens / max(job.seconds, 1e-9)
    lines = [
        f"adapter    {output}/final_lora, {job.published}",
        f"eval loss  {shown}",
        f"time       {minutes:.1f} min since this start, {job.seconds / 60:.1f} in steps",
        f"speed      {rate:,.0f} tokens/s, {job.peak_gib:.1f} GiB of GPU memory",
    ]
    report("done", "\n".join(lines))
    if losses:
        report_runs([output], least=2)
    base = shlex.join([args.model_name, "--revision", args.model_revision])
    rank = max(8, 1 << (args.lora_r - 1).bit_length())  # vLLM's
    served = f"companion={output}/final_lora" + "_vllm" * (output / "final_lora_vllm").exists()
    command = f"""{shlex.join(["python", *sys.argv, "--chat"])}
vllm serve {base} \\
  --enable-lora --max-lora-rank {rank} --lora-modules {shlex.quote(served)} \\
  --default-chat-template-kwargs '{{"enable_thinking": false}}'"""
    report("next", command)


# ==== 12 Chat: talk to what was trained


def chat(job):
    """Talk to OUTPUT_DIR/final_lora, or answer the lines of a pipe; nothing is written."""
    args, folder = job.args, job.output / "final_lora"
    fault = f"--chat: {folder} is no adapter"
    if not (sys.stdin and sys.stdout and (folder / "adapter_config.json").exists()):
        raise SystemExit(f"{fault}, or stdin or stdout is closed; train first")
    sys.stdin.reconfigure(errors="replace")
    with blame(fault, "train again", Exception):
        saved = peft.PeftConfig.from_pretrained(folder)
    args.model_name = str(saved.base_model_name_or_path)
    args.model_revision = saved.revision or "main"
    system = [m for m in read_examples(args.train_file)[0]["messages"] if m["role"] == "system"]
    report("device", check_device(args))
    job.config, job.tokenizer = load_config_and_tokenizer(args)
    base = load_model(args).to(args.device)
    with blame(fault, "train again", Exception):
        model = peft.PeftModel.from_pretrained(base, folder).eval()
    to_ids = partial(job.tokenizer.apply_chat_template, add_generation_prompt=True, **SERVED)
    report("chat", "/base or /adapter answers from now on; /new; /quit")
    turns, who = [], "/adapter"
    with suppress(EOFError):
        while (said := input("you> ").strip()) != "/quit":
            if not sys.stdin.isatty():
                print(said)
            if said in ("/base", "/adapter"):
                who = said
            elif said == "/new":
                turns = []
            elif said and said[0] != "/":
                print(f"{who[1:]}> ", end="", flush=True)
                turns.append({"role": "user", "content": said})
                streamer = transformers.TextStreamer(job.tokenizer, True, skip_special_tokens=True)
                with model.disable_adapter() if who == "/base" else nullcontext():
                    reply = answer(model, job, to_ids(system + turns), streamer)
                turns.append({"role": "assistant", "content": reply})


# ==== 13 run, signals, main


def run(job):
    """Do the job: the table of contents, with the sections' numbers."""
    args = job.args
    if args.chat:
        return chat(job)  # 12
    if args.compare:
        if not report_runs(args.compare, least=1):  # 11
            raise SystemExit(f"--compare: no finished run in {args.compare}")
        return
    if is_first() and not args.dry_run:
        open_log(job.output)  # 8
    if args.demo:
        report("demo", "random weights: nothing here is about quality")
    examples = read_examples(args.train_file)  # 3
    held_out = read_examples(args.eval_file) if args.eval_file else []
    warn_of_repeats(examples, held_out)
    if not args.dry_run:
        job.device = check_device(args)  # 4
    job.config, job.tokenizer = load_config_and_tokenizer(args)
    job.train = encode(examples, job.tokenizer, args.max_seq_len)  # 5
    job.eval = encode(held_out, job.tokenizer, args.max_seq_len)
    job.data = report_tokens({args.train_file: job.train, args.eval_file: job.eval})
    show_example(job.train[0], job.tokenizer)
    job.plan = make_plan(args, job.config, len(job.train))  # 6
    if args.dry_run:
        return
    check_shares(job)
    report("device", job.device)
    if is_first():
        job.products = choose_products(job)  # 7
        job.checkpoint = find_checkpoint(job)  # 8
    decided = accelerate.utils.broadcast_object_list([job.products, job.checkpoint])
    job.products, job.checkpoint = decided
    job.started = time.time()
    write_record(job, "running")
    trainer = build_trainer(job)  # 9
    check_injection(trainer.model, job.plan)
    fit_memory(trainer, job)
    train(trainer, job)  # 10
    accelerate.PartialState().wait_for_everyone()
    if not is_first():
        return
    model = publish(trainer, job)  # 11
    write_record(job, "finished")
    write_extras(model, job)
    write_record(job, "finished")
    summarize(job)


def set_environment(args):
    """Set what libraries read; remove what would undo a constant."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    left_over = "ACCELERATE_.*|MPLBACKEND"
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # no launcher is at work
        left_over += "|RANK|LOCAL_RANK|WORLD_SIZE"
        os.environ["CUDA_VISIBLE_DEVICES"] = os.getenv("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if args.device == "cpu":  # beside another busy process 28 s, not 245
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for name in [*os.environ]:
        if re.fullmatch(left_over, name):
            del os.environ[name]
    logging.getLogger("transformers.integrations.hub_kernels").setLevel("ERROR")  # "install fla"
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT's call


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals(job):
    """A signal in a step: on_save() stops after it. Elsewhere, or again: all stops at once."""

    def on_signal(number, _):
        again, job.stopped_by = job.stopped_by, number
        if job.is_training and (not again or "TORCHELASTIC_RUN_ID" in os.environ):
            report("stopping", "this step is finished and saved first; once more stops at once")
            return
        rest = "; the same command goes on from the newest checkpoint, if any"
        if job.published:
            rest = f"; {job.output}/final_lora is whole; the same command starts anew"
        raise KeyboardInterrupt(number, "stopped" + rest * (not job.args.chat))

    for one in SIGNALS:
        if signal.getsignal(one) != signal.SIG_IGN:  # nohup's
            signal.signal(one, on_signal)


def explain(error):
    """Return (status, message) for what ended a run; no message for a bug."""
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
        return 1, f"out of memory ({text}); {advice}"
    # A full disk.
    if isinstance(error, OSError) or kind in ("SafetensorError", "Exception") or "inline_" in text:
        return 1, f"a file could not be written or read ({text}); make room, and run it again"
    return 1, ""


def main(argv=None):
    """Run the command; exit with 1, or 2 after a bad flag, or 128 + a signal."""
    args = parse_args(argv)
    set_environment(args)
    job = Job(args)
    catch_signals(job)
    try:
        run(job)
    except BaseException as error:
        for one in SIGNALS:  # nothing may break off the rest
            signal.signal(one, signal.SIG_IGN)
        LOG.info("ended by", exc_info=True)
        status, message = explain(error)
        if job.stopped_by and status == 1:
            status, message = 128 + job.stopped_by, f"stopped ({message or repr(error)})"
        outcome = f"{'interrupted' if status > 1 else 'failed'}: {message or repr(error)}"
        write_record(job, "finished" if job.published else outcome)
        if not message:
            raise
        print(message, file=sys.stderr)
        raise SystemExit(status)
    finally:
        logging.shutdown()
        for one in SIGNALS:  # exit waits for threads
            signal.signal(one, signal.SIG_DFL)


class Unbreakable(io.FileIO):
    """An output whose reader may go away."""

    def write(self, data):
        """Write data, or drop it."""
        with suppress(OSError):
            super().write(data)


if __name__ == "__main__":
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name):  # not closed by the shell
            raw = Unbreakable(number, "w", closefd=False)
            text = io.TextIOWrapper(raw, "utf-8", "backslashreplace", line_buffering=True)
            setattr(sys, name, text)
    main()
