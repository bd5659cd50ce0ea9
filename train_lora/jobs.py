"""Which checkpoints belong to this job.

Each job has a folder, checkpoints/<hash of the job>/, whose job.json says what it is: settings,
fields of LoraConfig and SFTConfig, model, and tokens of TRAIN_FILE. Changing one of these (not
those in MAY_CHANGE) begins another job; changing it back resumes the first. If only the tokens of
EVAL_FILE change, or the code, the run lists the choices. On a CPU a resumed run ends in the same
bytes as one that was never stopped.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path

from train_lora.base import Base, BaseRequest, facts_of_base
from train_lora.checkpoints import (
    CODE,
    HELD_OUT,
    History,
    checkpoints_in,
    final_step,
    is_intact,
    jobs_in,
    set_losses_aside,
)
from train_lora.code import code_of_job
from train_lora.console import UserError, join_limited, one_line, report
from train_lora.data import Data
from train_lora.files import Facts, as_json_value, file_sha256, read_json, short_hash
from train_lora.settings import Settings, examples_per_step
from train_lora.tokens import rows_of

MAY_CHANGE = {  # within a job, if the tokens and the examples per step stay the same
    "DEVICE", "OUTPUT_DIR", "LOGGING_STEPS", "SAVE_STEPS", "EVAL_STEPS", "FINAL_LORA", "REPORT_TO",
    "MATMUL", "USE_FLA", "TRAIN_FILE", "EVAL_FILE", "REPLIES", "MAX_SEQ_LEN", "BATCH_SIZE",
    "GRADIENT_ACCUMULATION_STEPS", "CHAT_TEMPLATE", "START_FROM",
}  # fmt: skip

HASHES = {  # of an identity, which tell nobody anything
    "chat template", "adapter of START_FROM", "tokens of TRAIN_FILE", "config.json of MODEL_NAME",
    "weights of MODEL_NAME",
}  # fmt: skip


@dataclass(frozen=True)
class EarlierWork:
    """What earlier sessions of this job left."""

    folder: Path  # of its checkpoints
    checkpoint: Path | None  # to resume from
    checkpoint_step: int
    loss_history: History
    sessions: list[Facts]  # that led to the checkpoint
    is_finished: bool = False
    is_of_other_code: bool = False  # continued under --edited_code
    owes_evaluation: bool = False  # at the checkpoint's step


def request_of(settings: Settings) -> BaseRequest:
    """Return which base the settings ask for.

    The newest job here with this model and revision fixes the commit, even if the branch has moved.
    """
    wanted, commit = (settings.MODEL_NAME, settings.MODEL_REVISION), ""
    for identity in jobs_in(Path(settings.OUTPUT_DIR)).values():
        if (identity.get("MODEL_NAME"), identity.get("MODEL_REVISION")) == wanted:
            commit = commit or identity["commit"]
    how = (settings.CHAT_TEMPLATE, settings.ENABLE_THINKING, settings.DTYPE, settings.DEVICE)
    return BaseRequest(*wanted, *how, settings.MATMUL, commit)


def identity_of(settings: Settings, base: Base, data: Data, **chosen: Facts) -> Facts:
    """Return what must be the same for a checkpoint to be resumed, as JSON values.

    chosen has the fields of LoraConfig and of SFTConfig that the script sets.
    """
    identity = {name: getattr(settings, name) for name in settings.names if name not in MAY_CHANGE}
    for kind, fields in chosen.items():
        identity |= {f"{kind}.{name}": value for name, value in fields.items()}
    start_file = Path(settings.START_FROM or os.devnull, "adapter_model.safetensors")
    identity |= facts_of_base(base) | {
        "examples in a step": examples_per_step(settings),
        "chat template": short_hash(base.tokenizer.get_chat_template()),
        "adapter of START_FROM": file_sha256(start_file),
    }
    identity["tokens of TRAIN_FILE"] = short_hash(rows_of(data.examples))
    identity |= {
        HELD_OUT: short_hash(rows_of(data.held_out)),
        CODE: code_of_job(settings.sources, settings.names),
    }
    for name, value in identity.items():
        if isinstance(value, float) and value.is_integer():
            identity[name] = int(value)  # 16 and 16.0 are the same job
    return json.loads(json.dumps(identity, default=as_json_value))


def folder_of(settings: Settings, identity: Facts) -> Path:
    """Return the folder of a job's checkpoints, whose name is a hash of what is trained."""
    trained = {name: value for name, value in identity.items() if name not in (HELD_OUT, CODE)}
    return Path(settings.OUTPUT_DIR, "checkpoints", short_hash(trained))


def find_earlier_work(settings: Settings, identity: Facts, steps: int) -> EarlierWork:
    """Find this job's newest intact checkpoint, or its finished adapter; print what was found."""
    folder, loss_history = folder_of(settings, identity), []
    final = Path(settings.OUTPUT_DIR, "final_lora")
    finished = read_json(final / "run.json")
    is_finished = finished.get("job") == folder.name
    if is_finished:
        loss_history = finished["loss_history"]
        step = final_step(settings, loss_history, steps)
        sha256 = file_sha256(final / "adapter_model.safetensors")
        if finished["adapter"] == {"step": step, "sha256": sha256}:
            refuse_what_cannot_be_compared(settings, identity, finished, is_finished=True)
            report(
                "finished",
                f"{final} is its adapter, of step {step:,}; another OUTPUT_DIR trains anew",
            )
            sessions = finished["sessions"]
            return EarlierWork(folder, None, 0, loss_history, sessions, is_finished=True)
    for step, checkpoint in checkpoints_in(folder).items():
        if not is_intact(checkpoint):
            report("resume", f"{checkpoint} is skipped: a file is missing or damaged")
            continue
        record = read_json(checkpoint / "run.json")
        refuse_what_cannot_be_compared(settings, identity, record)
        if step < steps or not loss_history:
            loss_history = read_json(checkpoint / "trainer_state.json")["log_history"]
        left = "resuming from" if step < steps else "all steps are done; final_lora is made from"
        report("resume", f"{left} {checkpoint}")
        tell_of_other_versions(record["sessions"][-1])
        is_edited = record["sessions"][-1][CODE] != identity[CODE]
        if is_edited:
            set_losses_aside(loss_history)
        return EarlierWork(
            folder,
            checkpoint,
            step,
            loss_history,
            record["sessions"],
            is_of_other_code=is_edited,
            owes_evaluation=record["owes_evaluation"],
        )
    if is_finished:
        step = final_step(settings, loss_history, steps)
        refuse_to_begin_again(settings, finished, final, step)
    tell_of_other_jobs(settings, identity, folder)
    return EarlierWork(folder, None, 0, [], [])


def refuse_to_begin_again(settings: Settings, record: Facts, final: Path, step: int) -> None:
    """Raise UserError for a job that is finished, but whose adapter of a step is gone."""
    lost = f"has other bytes than the run wrote, and the checkpoint of step {step:,} is gone"
    if record["adapter"]["step"] != step:
        lost = f"is of step {record['adapter']['step']:,}, and the checkpoint of {step:,} is gone"
    ways = f"another OUTPUT_DIR trains anew, as does this one without {final}"
    problem = f"This job is finished, but {final} {lost}: {ways}."
    if not settings.dry_run:
        raise UserError(problem)
    report("warning", problem)


def refuse_what_cannot_be_compared(
    settings: Settings, identity: Facts, record: Facts, is_finished: bool = False
) -> None:
    """Raise UserError if other lines were held out, or other code was run; a dry run only warns."""
    ways = ["another OUTPUT_DIR trains anew"]
    if record["identity"][HELD_OUT] != identity[HELD_OUT]:
        then = record["settings"]
        names = ["EVAL_FILE", "REPLIES", "MAX_SEQ_LEN"]  # what decides which replies are held out
        changed = [
            f"{name} {then[name]}" for name in names if getattr(settings, name) != then[name]
        ]
        difference = "its losses are of other held-out replies"
        ways.insert(0, f"{', '.join(changed) or 'the former lines of EVAL_FILE'} to go on")
    elif record["sessions"][-1][CODE] != identity[CODE]:
        if settings.edited_code:
            return
        difference = "the code has been edited since"
        if is_finished:
            ways.append("--edited_code takes its adapter as it is")
        else:
            ways.insert(0, "put it back to go on")
            ways.append("--edited_code goes on with the edited code")
    else:
        return
    state = "is finished" if is_finished else "has steps behind it"
    problem = f"The job in {settings.OUTPUT_DIR} {state}, but {difference}: {'; '.join(ways)}."
    if not settings.dry_run:
        raise UserError(problem)
    report("warning", problem)


def tell_of_other_versions(session: Facts) -> None:
    """Print which libraries have another version than in a session."""
    changed = [
        f"{name} {session['versions'][name]}, now {importlib.metadata.version(name)}"
        for name in ("torch", "transformers", "peft", "trl")
        if importlib.metadata.version(name) != session["versions"][name]
    ]
    if changed:
        report("warning", f"the last session had {'; '.join(changed)}: the bytes may differ")


def tell_of_other_jobs(settings: Settings, identity: Facts, folder: Path) -> None:
    """Print which other jobs have checkpoints here."""
    identities = jobs_in(Path(settings.OUTPUT_DIR))
    identities.pop(folder, None)
    if identities:
        newest = next(iter(identities.values()))
        names = [name for name in {**newest, **identity} if newest.get(name) != identity.get(name)]
        # LEARNING_RATE is SFTConfig.learning_rate, too, and hashes tell nobody anything.
        names = [
            name for name in names if "." not in name and name not in (HELD_OUT, CODE)
        ] or names
        values = [
            f"other {name}" if name in HASHES else f"{name} {one_line(newest.get(name), 40)}"
            for name in names
        ]
        jobs = f"earlier jobs in {folder.parent}, to resume or delete: {len(identities)}"
        report("resume", f"a new job; {jobs}; the newest had {join_limited(values, 3, '; ')}")
