"""Run the script as on another machine: python tests/benchmarks/as_card.py plain|v100 FLAGS

plain  flash-linear-attention counts as not installed
v100   in addition only SDPA's math kernel is there, and the GPU says that it is an sm_70
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train_lora_single as t


def main(kind: str, flags: list[str]) -> None:
    """Change what the script will find, and run it."""
    t.forbid_gpu_packages()
    if kind == "v100":
        import torch

        for name in ("flash", "mem_efficient", "cudnn"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)
        torch.cuda.get_device_capability = lambda *_: (7, 0)
    t.survive_closed_outputs()
    t.main(flags)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
