"""How true the products are, with real numbers on the CPU.

precision  error of LoRA's gradients against float32, for three seeds, TRL's own way among others
products   losses of a short run of SmolLM2-135M with scaled float16 products, against bfloat16's
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import statistics
import unittest.mock
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import (
    HELD_OUT,
    ROOT,
    TRAIN,
    Options,
    in_a_new_process,
    prepared_job,
    quiet,
    qwen_folder,
    shipped_lines,
    speaking_model,
    t,
    table,
    with_lora,
    write_lines,
)

SEEDS = (0, 1, 2)


# ==== precision


@dataclass(frozen=True)
class Way:
    """A way to compute gradients."""

    name: str
    dtype: str  # of the frozen weights
    autocast: bool = False
    products: str = "native"


EXACT = Way("", "float32")
BFLOAT16 = Way("bfloat16 weights, no autocast (this script)", "bfloat16")
FLOAT16 = Way("the same with scaled float16 products", "bfloat16", products="float16")
WAYS = (
    BFLOAT16,
    FLOAT16,
    Way("bfloat16 weights, bfloat16 autocast", "bfloat16", autocast=True),
    Way("float32 weights, bfloat16 autocast (TRL)", "float32", autocast=True),
)


def precision(options: Options) -> None:
    """Compare LoRA's gradients with those that float32 gives for the same weights."""
    speaking = speaking_model(options)
    cases = {
        Path(speaking).name: (speaking, lambda seed: shipped_rows(speaking, seed, options)),
        "random layers of Qwen3.5-4B": (random_layers(options), random_rows),
    }
    print(
        "PRECISION error of LoRA's gradients against float32 on the same weights, on the CPU;\n"
        f"          |g - g32| / |g32| for {len(SEEDS)} seeds (rows and LoRA's values), and its mean"
    )
    row = table(46, *[9 for _ in SEEDS], 9, 9, 13)
    for name, (folder, rows_of) in cases.items():
        print(row(name, *[f"seed {seed}" for seed in SEEDS], "mean", "spread", "1 - cosine"))
        errors: dict[Way, list[float]] = {way: [] for way in WAYS}
        angles: dict[Way, list[float]] = {way: [] for way in WAYS}
        for seed in SEEDS:
            rows = rows_of(seed)
            exact = gradients(folder, EXACT, rows, seed)
            for way in WAYS:
                error, angle = difference(gradients(folder, way, rows, seed), exact)
                errors[way].append(error)
                angles[way].append(angle)
        for way in WAYS:
            each = errors[way]
            cells = [*each, statistics.fmean(each), statistics.stdev(each)]
            angle = statistics.fmean(angles[way])
            print(row(way.name, *[f"{one:.2%}" for one in cells], f"{angle:.1e}"), flush=True)
        ratio = statistics.fmean(errors[FLOAT16]) / statistics.fmean(errors[BFLOAT16])
        target = options.targets.at_most(f"precision: {name}", ratio, 1.02)
        print(f"float16's mean error against bfloat16's: {ratio:.3f}   {target}\n")
    used = matmul_if_faster(options)
    is_taken = used["used"] == "float16"
    options.targets.require("precision: auto does not take float16, though faster", is_taken)
    ratio = used["float16"]["error"] / used["native"]["error"]
    print(
        f"MATMUL auto takes {used['used']} where float16 is ten times faster; its products err "
        f"{ratio:.4f} times as much\non the model's shapes   target: float16"
        + ("" if is_taken else "  MISSED")
    )


def matmul_if_faster(options: Options) -> dict[str, Any]:
    """Return what "auto" takes on a GPU where scaled float16 products are ten times faster."""
    import accelerate

    lines = shipped_lines(TRAIN, 8, shortest=True)
    data = write_lines(options.folder / "few.jsonl", lines)
    flags = ["--model_name", qwen_folder(options), "--train_file", str(data), "--eval_file", ""]
    job = prepared_job(*flags)
    accelerate.PartialState(cpu=True)
    seconds = itertools.cycle([1.0, 0.1])  # the script measures "native" first
    with (
        quiet(),
        float16_cores(),
        unittest.mock.patch.object(t, "seconds_of", lambda *_: next(seconds)),
    ):
        t.choose_matmul(job)
    return job.matmul


def shipped_rows(model: str, seed: int, options: Options) -> list[dict[str, Any]]:
    """Return some of the shipped conversations, drawn with a seed, each as a batch of one."""
    lines = shipped_lines(TRAIN, 8 if options.tiny else None, shortest=options.tiny)
    lines = random.Random(seed).sample(lines, 2 if options.tiny else 8)
    data = write_lines(options.folder / "rows.jsonl", lines)
    flags = ["--model_name", model, "--train_file", str(data), "--eval_file", ""]
    return [t.pad([example], "cpu") for example in prepared_job(*flags).train]


def random_rows(seed: int) -> list[dict[str, Any]]:
    """Return two rows of random tokens."""
    import torch

    drawn = torch.Generator().manual_seed(seed)
    rows = []
    for length in (64, 100):
        ids = torch.randint(2048, (1, length), generator=drawn)
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    return rows


def random_layers(options: Options) -> str:
    """Write a block of Qwen3.5-4B's layers with random weights and few words; return its folder."""
    import torch
    import transformers

    block = options.sizes["full_attention_interval"]
    sizes = options.sizes | {"num_hidden_layers": block, "vocab_size": 2048}
    torch.manual_seed(0)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen3_5TextConfig(**sizes), dtype=torch.bfloat16
        )
        model.save_pretrained(options.folder / "layers")
    return str(options.folder / "layers")


def gradients(folder: str, way: Way, rows: list[dict[str, Any]], seed: int) -> Any:
    """Return the gradient of LoRA's weights, which a seed makes the same for every way."""
    import torch
    import transformers

    with quiet(), float16_cores():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        model = model.to(getattr(torch, way.dtype))
        if way.products == "float16":
            t.use_float16_products(model)
        model = with_lora(model, t.parse_settings(["--lora_dropout", "0"]))
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        drawn = torch.Generator().manual_seed(seed)
        for weight in weights:
            weight.data.normal_(std=0.02, generator=drawn)
        for row in rows:
            learned = (row["labels"] != -100).sum() * len(rows)
            with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
                loss = t.reply_losses(model, row).sum() / learned
            loss.backward()
    return torch.cat([weight.grad.double().flatten() for weight in weights])


def difference(found: Any, exact: Any) -> tuple[float, float]:
    """Return a gradient's relative error, and 1 - the cosine of its angle to the exact one."""
    import torch

    error = (found - exact).norm() / exact.norm()
    return error.item(), 1 - torch.cosine_similarity(found, exact, 0).item()


@contextlib.contextmanager
def float16_cores() -> Iterator[None]:
    """Multiply float16 as tensor cores do: in float32, rounded once.

    torch does so on a CPU too, but is up to a thousand times slower than here.
    """
    import torch

    product = torch.Tensor.__matmul__

    def multiply(a: Any, b: Any) -> Any:
        is_half = a.dtype == b.dtype == torch.float16
        return product(a.float(), b.float()).half() if is_half else product(a, b)

    with unittest.mock.patch.object(torch.Tensor, "__matmul__", multiply):
        yield


# ==== products


def products(options: Options) -> None:
    """Train a small model with either kind of products: the losses are to be the same."""
    model = speaking_model(options)
    counts = {"train": (TRAIN, 8 if options.tiny else 120), "eval": (HELD_OUT, 20)}
    flags = ["--model_name", model, "--device", "cpu", "--dtype", "bfloat16", "--num_epochs", "1"]
    flags += ["--batch_size", "1", "--num_samples", "0", "--evidence_examples", "0"]
    for name, (path, count) in counts.items():
        lines = shipped_lines(path, 2 if options.tiny and name == "eval" else count, shortest=True)
        flags += [f"--{name}_file", str(write_lines(options.folder / f"{name}.jsonl", lines))]
    losses: dict[str, list[float]] = {}
    evals: dict[str, list[float]] = {}
    for kind in ("native", "float16"):
        output = options.folder / kind
        in_a_new_process(train_apart, [*flags, "--matmul", kind, "--output_dir", str(output)])
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        options.targets.require(f"products: {kind}", record["matmul"]["used"] == kind)
        history = record["loss_history"]
        losses[kind] = [entry["loss"] for entry in history if "loss" in entry]
        evals[kind] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    pairs = list(zip(losses["native"], losses["float16"], strict=True))
    apart = [abs(one - other) / one for one, other in pairs]
    print(
        f"PRODUCTS  {Path(model).name}, bfloat16 weights, on the CPU; the {counts['train'][1]} "
        f"shortest lines, {len(pairs)} steps"
    )
    row = table(24, 12, 12, 16, 16)
    print(row("", "first loss", "last loss", "held out, base", "held out, end"))
    for kind, found in losses.items():
        cells = [found[0], found[-1], evals[kind][0], evals[kind][-1]]
        print(row(f"{kind} products", *[f"{one:.4f}" for one in cells]))
    most = options.targets.at_most("products: losses of a step apart", max(apart), 0.01)
    print(f"a step's losses are apart by {max(apart):.2%} at most   {most}")
    print(f"on average by {statistics.fmean(apart):.2%}")
    last = abs(evals["native"][-1] - evals["float16"][-1])
    target = options.targets.at_most("products: last held-out losses apart", last, 0.01)
    print(f"the last held-out losses are {last:.4f} apart   {target}")


def train_apart(flags: list[str]) -> None:
    """Train with float16_cores(); for a new process, since the script's log stays open."""
    os.chdir(ROOT)
    with quiet(), float16_cores():
        t.main(flags)
