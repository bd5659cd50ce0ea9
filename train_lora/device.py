"""The device, how it computes, and its memory.

Under torchrun or `accelerate launch` each process has a GPU of its own and holds the whole model.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import sys
import time

import accelerate
import torch
from torch import nn

from train_lora.console import UserError, one_line, report
from train_lora.environment import IS_WSL
from train_lora.settings import Settings, examples_per_step


def prepare_device(settings: Settings) -> None:
    """Choose the device; a dry run needs none. Refuse a step that the processes cannot share."""
    use_fla = settings.USE_FLA and not settings.dry_run
    choose_device("cpu" if settings.dry_run else settings.DEVICE, settings.DTYPE, use_fla)
    processes = accelerate.PartialState().num_processes
    if examples_per_step(settings) % processes:
        size = "BATCH_SIZE x GRADIENT_ACCUMULATION_STEPS"
        raise UserError(f"{size} must be divisible by the {processes} processes.")


def choose_device(device: str, dtype: str, use_fla: bool) -> None:
    """Choose the device, and refuse one that does not work.

    This comes before the model's code is imported: transformers uses fla and causal_conv1d
    wherever they import, even if their kernels crash.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    if is_launched and {"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys():
        raise UserError("FSDP and DeepSpeed are not supported; use plain torchrun.")
    # Leftover variables would change this run: ACCELERATE_MIXED_PRECISION enables autocast.
    of_launchers = () if is_launched else ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    for name in [*os.environ]:
        if name.startswith("ACCELERATE_") or name in of_launchers:
            del os.environ[name]
    keep_out("causal_conv1d")
    # float16 products are summed in float32, see fp16_matmul.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.set_float32_matmul_precision("highest")  # NVIDIA's containers ask for TF32
    # torch 2.9 prefers it on an H100, where it reads past its inputs (pytorch 169849, 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    fault = "it needs a GPU"
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        accelerate.PartialState(cpu=True)
    else:
        check_gpu(dtype, is_launched)
        fault = fault_of_fla()
    if fault or not use_fla:
        keep_out("fla")
    if fault and use_fla:
        report("fla", f"{fault}; torch's code takes its place")


def keep_out(package: str) -> None:
    """Have every import of a package fail, as if it were not installed."""
    sys.modules[package] = None  # type: ignore[assignment]  # Python documents it


def is_kept_out(package: str) -> bool:
    """Return whether keep_out() was called for a package."""
    return package in sys.modules and sys.modules[package] is None


def check_gpu(dtype: str, is_launched: bool) -> None:
    """Choose one GPU, and try a matmul."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    try:
        torch.cuda.init()  # says why there is no GPU
        accelerate.PartialState()  # gives each process of a launch its own GPU
        ones = torch.ones(8, 8, device="cuda", dtype=getattr(torch, dtype))
        (ones @ ones).sum().item()  # a torch without this GPU's kernels says so only now
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"DEVICE cuda: torch {torch.__version__} cannot use GPU {visible} ({one_line(error)}). "
            "It takes an NVIDIA GPU, V100 or newer (a V100 with driver 525 to 580, others with 525 "
            "or newer), or a small model and --device cpu. If there is one, the environment "
            "variable PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False may help."
        ) from error
    free, total = (size / 2**30 for size in torch.cuda.mem_get_info())
    report("device", f"{torch.cuda.get_device_name()}, {free:.1f} of {total:.1f} GiB are free")


def fault_of_fla() -> str:
    """Return why flash-linear-attention cannot be used on this GPU, or ""."""
    # On Hopper gradients were wrong below 0.5 (fla issue 640), and up to 0.6.0 it cannot train with
    # Triton 3.4 to 3.7.0; on Blackwell vLLM's copies were silently wrong (vllm issue 36414).
    if torch.cuda.get_device_capability()[0] != 8:
        return "it is used only on GPUs of capability 8.0 to 8.9"
    if importlib.util.find_spec("fla") is None:
        return "it is not installed (pip install flash-linear-attention)"
    return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether this is the error of torch, cuBLAS, cuDNN or Triton when memory is full."""
    words = "out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    # On a MIG slice torch fails while it asks who holds the memory (pytorch 112377, 197312).
    words += "|NVML_SUCCESS == r"
    words += "|device not ready" if IS_WSL else ""
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(words, str(error)))


def free_memory(model: nn.Module) -> None:
    """Drop what a pass has left: gradients, and what torch keeps of the GPU's memory."""
    model.zero_grad()
    if torch.cuda.is_initialized():
        gc.collect()
        time.sleep(0.1)  # autograd's thread may hold a failed pass's tensors this long
        torch.cuda.empty_cache()
