"""Run the script as on another machine: python tests/benchmarks/as_card.py plain|v100 FLAGS

With inspect as the first of FLAGS inspect_lora.py is run instead.

plain  flash-linear-attention counts as not installed
v100   in addition only SDPA's math kernel is there, and the GPU says that it is an sm_70
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import t
from benchmarks.precision import float16_cores


def main(kind: str, flags: list[str]) -> None:
    """Change what the script will find, and run it."""
    t.forbid_gpu_packages()
    on_a_cpu: contextlib.AbstractContextManager = contextlib.nullcontext()
    if kind == "v100":
        import torch

        for name in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)
        torch.cuda.get_device_capability = lambda *_: (7, 0)
        if not torch.cuda.is_available():  # float16 is very slow there
            on_a_cpu = float16_cores()
    t.survive_closed_outputs()
    with on_a_cpu:
        if flags[0] == "inspect":
            import inspect_lora

            inspect_lora.main(flags[1:])
        else:
            t.main(flags)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
