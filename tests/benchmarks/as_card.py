"""Run the script as on another machine: python tests/benchmarks/as_card.py KIND FLAGS

plain     flash-linear-attention counts as not installed
v100      in addition only SDPA's math kernel is there, and the GPU says that it is an sm_70
stopped   as v100, and in the second step the run gets SIGUSR1, as Slurm sends it
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import float16_cores, t, torch


def main(kind: str, flags: list[str]) -> None:
    """Change what the script will find, and run it."""
    t.forbid_gpu_packages()
    on_a_cpu: contextlib.AbstractContextManager = contextlib.nullcontext()
    if kind != "plain":
        for name in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)
        torch.cuda.get_device_capability = lambda *_: (7, 0)
        if not torch.cuda.is_available():  # float16 is very slow there
            on_a_cpu = float16_cores()
    if kind == "stopped":
        stop_in_step(2)
    t.survive_closed_outputs()
    with on_a_cpu:
        t.main(flags)


def stop_in_step(number: int) -> None:
    """Have the run send itself SIGUSR1 within a step."""
    real, steps = t.LoraTrainer.training_step, []

    def step(*given: object, **named: object) -> torch.Tensor:
        steps.append(None)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(*given, **named)

    t.LoraTrainer.training_step = step


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
