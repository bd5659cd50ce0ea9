"""What libraries read when they are imported; both commands prepare it before."""

from __future__ import annotations

import os
import sys

IS_WSL = "microsoft" in os.uname().release.lower()  # Windows' Linux, whose driver has its own ways


def prepare() -> None:
    """Set environment variables that torch, TRL, PEFT and the hub's library read."""
    # Busy-waiting threads slowed a small CPU model from 28 s to 245 s beside another process.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # TRL refuses several visible GPUs without a launcher. PEFT imports bitsandbytes where it is
    # installed, which starts the driver with those that are visible by then.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        first_gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
        os.environ["CUDA_VISIBLE_DEVICES"] = first_gpu
    # Micro-batch widths vary, which fragments memory. Under WSL this may fail (pytorch 192330).
    if not IS_WSL and "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ["USE_HUB_KERNELS"] = "NO"  # transformers 5.25 runs kernels of the hub unasked
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
