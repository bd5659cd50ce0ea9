"""What happens around the steps: what is printed, evaluation, saving and stopping."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import accelerate
import safetensors.torch
import torch
import transformers
from tqdm import tqdm

from train_lora.checkpoints import (
    best_step,
    checkpoints_in,
    cpu_tensors_of,
    differing,
    eval_losses,
    set_losses_aside,
)
from train_lora.console import LOG, UserError, is_main_process, report
from train_lora.files import Facts, file_sha256, write_json
from train_lora.record import write_record
from train_lora.stopping import Stopped
from train_lora.trainer import MicroBatchedTrainer

STEPS_TO_LOG = 20  # of a session, with what the terminal does not show


def load_last_step(trainer: MicroBatchedTrainer, checkpoint: Path) -> None:
    """Load the checkpoint of a job whose steps are all done; Trainer would do one more step."""
    state = str(checkpoint / "trainer_state.json")
    trainer.state = transformers.TrainerState.load_from_json(state)
    trainer.model.load_adapter(checkpoint, "default", is_trainable=True)
    evaluate_if_missing(trainer)


def check_what_was_loaded(trainer: MicroBatchedTrainer, checkpoint: Path) -> None:
    """Raise RuntimeError unless the adapter and the optimizer's steps are the checkpoint's."""
    saved = safetensors.torch.load_file(checkpoint / "adapter_model.safetensors")
    wrong = differing(saved, cpu_tensors_of(trainer.model))
    states = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    saved_steps, steps = steps_of(states), steps_of(trainer.optimizer.state_dict())
    if wrong or steps != saved_steps:
        problem = f"{checkpoint} was not loaded as it is: tensors {wrong[:3]} differ"
        raise RuntimeError(f"{problem}, and the optimizer has done other steps: {steps}"[:500])


def steps_of(states: Facts) -> dict[int, float]:
    """Return how many steps an optimizer has done for each weight; 0 if it does not count."""
    return {number: float(state.get("step", 0)) for number, state in states["state"].items()}


def evaluate_if_missing(trainer: MicroBatchedTrainer) -> None:
    """Measure the held-out loss of the base, or of the checkpoint, unless already done."""
    job, state, step = trainer.job, trainer.state, trainer.job.earlier.checkpoint_step
    if job.earlier.is_of_other_code:
        set_losses_aside(state.log_history)
        if job.data.held_out:
            report("eval", "measuring the base again, as the code was edited")
            state.global_step = 0
            trainer.evaluate()
            state.global_step = step
    is_due = job.measures_at(step) or job.earlier.owes_evaluation
    if is_due and step not in eval_losses(job.earlier.loss_history):
        report("eval", "measuring the held-out loss first")
        trainer.evaluate()


class RunEvents(transformers.TrainerCallback):
    """What Trainer calls around steps: print, check, evaluate, save and stop."""

    def __init__(self, trainer: MicroBatchedTrainer) -> None:
        """Keep the trainer and its job; the first step notes the time."""
        self.trainer, self.job, self.began = trainer, trainer.job, 0.0
        self.step_began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """First measure the base's held-out loss, or one that a signal cut short."""
        if checkpoint := self.job.earlier.checkpoint:
            check_what_was_loaded(self.trainer, checkpoint)
        evaluate_if_missing(self.trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From now on, let a signal wait until the step is finished and saved."""
        self.job.session.stop.finish_first = "the step"
        self.step_began = time.monotonic()
        self.began = self.began or self.step_began

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide what comes next: Trainer logs, then evaluates, then saves."""
        job, stop, step = self.job, self.job.session.stop, state.global_step
        accelerator, is_asked = self.trainer.accelerator, stop.signal > 0
        if accelerator.num_processes > 1:  # check_trigger() waits for the GPU
            if is_asked:
                accelerator.set_trigger()
            is_asked = accelerator.check_trigger()
        if is_asked:
            stop.agree()
        ends = step % job.plan.steps_per_epoch == 0 or step == job.plan.steps
        saves = ends or step % job.settings.SAVE_STEPS == 0
        evaluates = job.measures_at(step)
        control.should_evaluate = evaluates and not stop.is_agreed
        control.should_save = saves or evaluates or stop.is_agreed

    def on_log(self, args: Any, state: Any, control: Any, logs: Facts, **_: Any) -> None:
        """Stop at a loss or a gradient that is not finite, before it is saved; print the losses."""
        job, session, step = self.job, self.job.session, state.global_step
        for key in ("loss", "grad_norm", "eval_loss", "start_loss"):
            if not math.isfinite(logs.get(key, 0.0)):
                advice = "lower LEARNING_RATE" if step else "check the model's files"
                exact = "--matmul native" if session.matmul == "float16" else "--dtype float32"
                raise UserError(f"{key} is {logs[key]} at step {step:,}: {advice}, or try {exact}.")
        session.loss_history = [*state.log_history]
        if "eval_loss" in logs:
            note = "  (the base model, before training)" if step == 0 else ""
            epoch = (state.epoch or 0) if step else 0
            report("eval", f"epoch {epoch:g}  loss {logs['eval_loss']:.4f}{note}")
        if "start_loss" in logs:
            report("eval", f"epoch 0  loss {logs['start_loss']:.4f}  (the adapter of START_FROM)")
        if "loss" in logs and step <= job.earlier.checkpoint_step + STEPS_TO_LOG:
            text = f"step {step}: {self.trainer.micro_batches_of_step} micro-batches, "
            text += f"{1000 * (time.monotonic() - self.step_began):.0f} ms, loss {logs['loss']}, "
            text += f"grad_norm {logs.get('grad_norm', math.nan)}"
            retries = torch.cuda.memory_stats() if torch.cuda.is_initialized() else {}
            LOG.info("step      %s, alloc retries %s", text, retries.get("num_alloc_retries", 0))
        every = job.settings.LOGGING_STEPS
        if "loss" in logs and (step in (1, job.plan.steps) or step % every == 0):
            losses = [entry["loss"] for entry in session.loss_history if "loss" in entry][-every:]
            seconds = (time.monotonic() - self.began) / (step - job.earlier.checkpoint_step)
            line = f"step {step:,}/{job.plan.steps:,}  loss {sum(losses) / len(losses):.4f}  "
            line += f"grad_norm {logs.get('grad_norm', math.nan):.2f}  "
            line += f"lr {logs['learning_rate']:.1e}  "
            left = tqdm.format_interval(seconds * (job.plan.steps - step))
            report("train", f"{line}{left} left")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Mark the checkpoint as intact, remove older ones, record the losses; stop if asked to."""
        job, session, step = self.job, self.job.session, state.global_step
        write_record(job, "running")  # so that a killed run keeps its losses
        accelerate.PartialState().wait_for_everyone()  # each process has saved its random state
        if is_main_process():
            folder = job.folder / f"checkpoint-{step}"
            (folder / "sha256.json").unlink(missing_ok=True)  # of a skipped one
            hashes = {path.name: file_sha256(path) for path in folder.iterdir()}
            write_json(folder / "sha256.json", hashes)
            # The newest two and the best one stay. Trainer's own rotation would miss an
            # evaluation made on resuming.
            saved = checkpoints_in(job.folder)
            whole = [number for number in saved if (saved[number] / "sha256.json").exists()]
            for older in [number for number in whole if number <= step][2:]:
                if older != best_step(session.loss_history, job.plan.steps):
                    shutil.rmtree(saved[older], ignore_errors=True)
        stop = session.stop
        stop.finish_first = "the step" if step < job.plan.steps else ""
        is_alone = self.trainer.accelerator.num_processes == 1
        if stop.is_agreed or (stop.signal and is_alone):
            raise Stopped(f"Stopped after step {step}; the same command resumes the run.")
