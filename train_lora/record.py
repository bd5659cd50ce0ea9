"""What run.json says: what the job is, and how each of its sessions ended."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from train_lora.checkpoints import CODE, checkpoints_in, eval_losses, is_intact
from train_lora.console import UserError, is_main_process, one_line
from train_lora.conversations import system_message_of
from train_lora.data import learned_hashes
from train_lora.files import file_sha256, is_full_disk, rename_old, write_json
from train_lora.job import Job
from train_lora.stopping import ignore_signals, is_stop


@contextlib.contextmanager
def recorded(job: Job) -> Iterator[None]:
    """Record what the job is, and the error or signal that ends this session, if any."""
    job.session.loss_history = job.earlier.loss_history
    if is_main_process():
        job.folder.mkdir(parents=True, exist_ok=True)
        write_json(job.folder / "job.json", job.identity)
        for step, checkpoint in checkpoints_in(job.folder).items():
            if step > job.earlier.checkpoint_step:  # skipped, so it no longer counts as one
                (checkpoint / "sha256.json").unlink(missing_ok=True)
        path, lines = job.output / "held_out.jsonl", job.data.held_out_lines
        if lines and not (path.exists() and path.read_text(encoding="utf-8") == lines):
            rename_old(path)
            path.write_text(lines, encoding="utf-8")
    write_record(job, "running")
    try:
        yield
    except BaseException as error:
        ignore_signals()  # nothing may interrupt what is left to do
        outcome = "interrupted" if is_stop(error) else "failed"
        if is_main_process():  # on a full disk, this makes room
            saved = checkpoints_in(job.folder)
            torn = [path for path in saved.values() if not (path / "sha256.json").exists()]
            for path in (job.output / ".partial", *torn):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # the first error is the one to show
            write_record(job, f"{outcome}: {one_line(error)}")
        if is_full_disk(error):
            saved = checkpoints_in(job.folder)
            step = next((step for step in saved if is_intact(saved[step])), 0)
            raise UserError(
                f"OUTPUT_DIR {job.output} cannot be written ({one_line(error)}): if the disk or "
                f"your quota is full, make room; the same command goes on after step {step:,}."
            ) from error
        raise


def write_record(job: Job, outcome: str, folder: Path | None = None, step: int = 0) -> None:
    """Write run.json into OUTPUT_DIR or, with learned.txt, beside a step's adapter."""
    if not is_main_process():
        return
    adapter, measured = None, eval_losses(job.session.loss_history)
    if folder:
        adapter = {"step": step, "sha256": file_sha256(folder / "adapter_model.safetensors")}
        learned = sorted(learned_hashes(job.data.examples, job.settings))
        (folder / "learned.txt").write_text("\n".join([*learned, ""]), encoding="utf-8")
    names = ["torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors"]
    has_gpu = torch.cuda.is_initialized()
    session = {
        "started": job.session.started,
        "command": shlex.join(["python", *sys.argv]),
        CODE: job.identity[CODE],
        "versions": {name: importlib.metadata.version(name) for name in names},
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        "capability": torch.cuda.get_device_capability() if has_gpu else None,
        "cuda": torch.version.cuda,  # that this torch was built for
        "matmul": job.session.matmul,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if has_gpu else None,
    }
    record = {
        "outcome": outcome,  # running, finished, interrupted: ..., or failed: ...
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "settings": {name: getattr(job.settings, name) for name in job.settings.names},
        "job": job.folder.name,
        "identity": job.identity,  # what a checkpoint must agree with
        "data": job.data.facts,
        "system_message": system_message_of(job.data.examples),
        "sessions": [*job.earlier.sessions, session],
        "adapter": adapter,
        # A signal may have come first. It is made up for when the job goes on.
        "owes_evaluation": job.measures_at(step) and step not in measured,
        "loss_history": job.session.loss_history,  # what Trainer logged
    }
    write_json((folder or job.output) / "run.json", record)
