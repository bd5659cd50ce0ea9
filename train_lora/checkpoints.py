"""The checkpoints and the losses that a job has left, and which of its steps is the best."""

from __future__ import annotations

from pathlib import Path

import peft
from torch import Tensor

from train_lora.files import Facts, file_sha256, read_json
from train_lora.settings import Settings

History = list[dict[str, float]]  # what Trainer logged
# Where a job with steps behind it differs in one of these alone, the run ends and lists the
# choices, since losses of before and after could not be compared.
HELD_OUT = "tokens of EVAL_FILE"
CODE = "code"


def checkpoints_in(folder: Path) -> dict[int, Path]:
    """Return {step: checkpoint} of a folder, the newest first, ignoring checkpoint-50-backup."""
    names = [path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*")]
    steps = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    return {step: folder / f"checkpoint-{step}" for step in steps}


def is_intact(checkpoint: Path) -> bool:
    """Return whether each file is as it was when RunEvents.on_save() wrote sha256.json.

    After a power cut any file may be torn, and neither torch nor safetensors checks a checksum.
    """
    hashes = read_json(checkpoint / "sha256.json")
    return hashes != {} and hashes == {name: file_sha256(checkpoint / name) for name in hashes}


def jobs_in(output: Path) -> dict[Path, Facts]:
    """Return {folder: the job's identity} of the jobs in an output folder, the newest first."""
    files = list(output.glob("checkpoints/*/job.json"))
    files.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    return {path.parent: read_json(path) for path in files}


def eval_losses(loss_history: History) -> dict[int, float]:
    """Return the held-out losses {step: nats per token}; that of step 0 is the base model's."""
    entries = [entry for entry in loss_history if "eval_loss" in entry]
    return {int(entry["step"]): entry["eval_loss"] for entry in entries}


def best_step(loss_history: History, last: int) -> int:
    """Return the step with the lowest held-out loss; the last one if none was measured."""
    losses = {step: loss for step, loss in eval_losses(loss_history).items() if step > 0}
    return min(losses, key=lambda step: losses[step], default=last)


def final_step(settings: Settings, loss_history: History, last: int) -> int:
    """Return the step whose adapter becomes final_lora."""
    return best_step(loss_history, last) if settings.FINAL_LORA == "best" else last


def set_losses_aside(loss_history: History) -> None:
    """Rename the losses of other code, so that none is compared with a later one."""
    for entry in loss_history:
        for name in ("loss", "eval_loss", "start_loss"):
            if name in entry:
                entry[f"{name}_of_other_code"] = entry.pop(name)


def cpu_tensors_of(model: peft.PeftModel) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names of its file."""
    tensors = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Return the names that only one of two adapters has, and those of unequal tensors."""
    common = first.keys() & second.keys()
    unequal = {name for name in common if not first[name].equal(second[name])}
    return sorted(first.keys() ^ second.keys() | unequal)
