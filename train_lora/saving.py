"""The adapter, its verification, and what a run leaves in OUTPUT_DIR.

    final_lora/        the adapter in PEFT's format, with tokenizer and card; verified
    final_lora_vllm/   the same, under the names that vLLM needs if it needs others; verified
    run.json           settings, versions, hashes and losses; also beside each adapter
    held_out.jsonl     what an EVAL_FILE like "10%" held out
    checkpoints/       a folder for each job: the newest two checkpoints, and the best one
    all_logs.log       everything that was printed, with tracebacks
    NAME.DATE-TIME     what an earlier run left under that name

learned.txt beside each adapter has a hash of each prompt it was trained on, so that it can be
measured on others. Anyone who guesses a prompt can tell that it was trained on.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import accelerate
import peft
import safetensors.torch
import torch
import transformers

from train_lora.checkpoints import (
    CODE,
    best_step,
    cpu_tensors_of,
    differing,
    eval_losses,
    final_step,
    is_intact,
)
from train_lora.console import UserError, is_main_process, report
from train_lora.conversations import SHIPPED, system_message_of
from train_lora.files import file_sha256, read_json, rename_old, write_json
from train_lora.job import Job
from train_lora.losses import reply_logits
from train_lora.record import write_record
from train_lora.tokens import pad
from train_lora.trainer import MicroBatchedTrainer

CARD = """---
base_model: {name}
library_name: peft
pipeline_tag: text-generation
---
# A LoRA adapter for {name}

It needs {name}, whose licence also applies. run.json has settings, losses and hashes
of the data. learned.txt has a hash of each prompt that was trained on: anyone who guesses
a prompt can tell. inspect-lora uses it to leave such prompts out; you may delete it.
Serve the adapter with the chat template beside it (chat_template.jinja),
enable_thinking={enable_thinking}, and the system message below if there is one.
Read its replies before anybody relies on them.

```python
import transformers

model = transformers.AutoModelForCausalLM.from_pretrained({name!r}{revision}, dtype={dtype!r})
model.load_adapter("final_lora")
chat = transformers.pipeline("text-generation", model, tokenizer="final_lora")
print(chat({messages}, tokenizer_encode_kwargs={{"enable_thinking": {enable_thinking}}}))
```
"""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes


def save_final_lora(trainer: MicroBatchedTrainer) -> None:
    """Write the adapter to .partial, verify it, and move it into place; one process does."""
    job, model = trainer.job, trainer.model
    accelerate.PartialState().wait_for_everyone()
    job.session.stop.finish_first = ""
    if not is_main_process():
        return
    torch.cuda.empty_cache()
    step = final_step(job.settings, job.session.loss_history, job.plan.steps)
    checkpoint = job.folder / f"checkpoint-{step}"
    if step != job.plan.steps:
        if not is_intact(checkpoint):
            raise UserError(f"{checkpoint}, the best one, is damaged; --final_lora last works.")
        model.load_adapter(checkpoint, "default", is_trainable=True)
    staging = job.output / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    final = staging / "final_lora"
    model.save_pretrained(final, save_embedding_layers=False)  # PEFT would ask the hub otherwise
    job.base.tokenizer.save_pretrained(final)
    (final / "README.md").write_text(card_of(job), encoding="utf-8")
    write_record(job, "finished", final, step)
    verified = verify_saved_adapter(model, job, final, checkpoint)
    save_for_vllm(job.base.config, final, staging / "final_lora_vllm")
    job.session.stop.finish_first = "the move"  # between two renames there may be no final_lora
    # final_lora comes last, as its run.json says that the job has finished. If the power fails
    # before, the last step's checkpoint decides: the next start writes final_lora from it.
    for name in ("final_lora_vllm", "final_lora"):
        rename_old(job.output / name)
        if (staging / name).is_dir():
            (staging / name).rename(job.output / name)
    staging.rmdir()
    write_json(job.output / "run.json", read_json(job.output / "final_lora" / "run.json"))
    report("verified", verified)
    summarize(job, step)


def card_of(job: Job) -> str:
    """Return the adapter's README.md."""
    system, commit = system_message_of(job.data.examples), job.base.commit
    messages = [{"role": "system", "content": system}] if system else []
    return CARD.format(
        name=job.settings.MODEL_NAME,
        revision=f", revision={commit!r}" if commit else "",
        dtype=job.settings.DTYPE,
        messages=[*messages, {"role": "user", "content": "Hello!"}],
        enable_thinking=job.base.enable_thinking,
    )


def save_for_vllm(base_config: transformers.PretrainedConfig, final: Path, for_vllm: Path) -> None:
    """Write the adapter again, with the names of the hub's model if that wraps the text model.

    With other names vLLM 0.17 to 0.32 silently serves the base model.
    """
    if base_config.get_text_config() is base_config:
        return
    for_vllm.mkdir()
    config = read_json(final / "adapter_config.json")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {name_in_wrapper(name): value for name, value in config[key].items()}
    write_json(for_vllm / "adapter_config.json", config)
    tensors = safetensors.torch.load_file(final / "adapter_model.safetensors")
    tensors = {name_in_wrapper(name): tensor for name, tensor in tensors.items()}
    path = for_vllm / "adapter_model.safetensors"
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    if names := differing(tensors, safetensors.torch.load_file(path)):
        raise UserError(f"Not verified: in {path} {len(names)} tensors differ ({names[:3]}).")
    shutil.copy(final / "run.json", for_vllm)  # it comes last, and says that all is there


def restore_results(job: Job) -> None:
    """Rewrite a finished job's final_lora_vllm and run.json if lost, or another job's."""
    if not is_main_process():
        return
    final, for_vllm = job.output / "final_lora", job.output / "final_lora_vllm"
    if file_sha256(for_vllm / "run.json") != file_sha256(final / "run.json"):
        rename_old(for_vllm)
        save_for_vllm(job.base.config, final, for_vllm)
    write_json(job.output / "run.json", read_json(final / "run.json"))


def name_in_wrapper(name: str) -> str:
    """Return the name that a module of the text model has in the hub's multimodal model."""
    return re.sub(r"(^|\.)model\.layers\b", r"\1model.language_model.layers", name, count=1)


def verify_saved_adapter(model: peft.PeftModel, job: Job, final: Path, checkpoint: Path) -> str:
    """Load the adapter from disk onto the base model; raise UserError unless it is the trained one.

    Every tensor, reloaded and in its step's checkpoint, must equal the trained one bit for bit. On
    the first reply of the shortest example the logits must be the trained model's, to a tenth of
    the adapter's effect. (A long one has too many logits.)
    """
    trained = cpu_tensors_of(model)
    examples = job.data.held_out or job.data.examples
    shortest = min(examples, key=lambda example: len(example.input_ids))
    inputs = pad([shortest.replies[0]], model.device)
    with torch.no_grad():
        logits = reply_logits(model.eval(), inputs)
        reloaded = peft.PeftModel.from_pretrained(model.unload(), final).eval()
        error = (reply_logits(reloaded, inputs) - logits).abs().max().item()
        with reloaded.disable_adapter():
            effect = (reply_logits(reloaded, inputs) - logits).abs().max().item()
    names = differing(trained, cpu_tensors_of(reloaded))
    path = checkpoint / "adapter_model.safetensors"
    names += differing(trained, safetensors.torch.load_file(path))
    note = f"logits differ by {error:.2g} from the trained model's, by {effect:.2g} from the base's"
    if names or not (effect > 0 and error <= effect / 10):
        raise UserError(
            f"Not verified: {len(names)} tensors differ ({names[:3]}), and {note}. "
            "If the last is about 0, LEARNING_RATE is too small."
        )
    return f"every tensor is the trained one, reloaded; {note}"


def summarize(job: Job, step: int) -> None:
    """Print the results, and the next commands."""
    history, final = job.session.loss_history, job.output / "final_lora"
    losses, best = eval_losses(history), best_step(history, job.plan.steps)
    result = f"{final} is the adapter of step {step:,} of {job.plan.steps:,}"
    if {0, step} <= losses.keys():
        result += f"\nheld-out loss: {losses[0]:.4f} -> {losses[step]:.4f} nats per token"
        if losses[best] < losses[step]:
            result += f"; lowest at step {best:,} ({losses[best]:.4f}): --final_lora best"
        starts = [entry["start_loss"] for entry in history if "start_loss" in entry]
        result += "".join(f"; START_FROM had {loss:.4f}" for loss in starts[-1:])
        if losses[step] > losses[0]:
            result += "\nWARNING: on held-out data the adapter is worse than its base"
    if len({session[CODE] for session in job.earlier.sessions} | {job.identity[CODE]}) > 1:
        result += "\nThe code was edited within this job: losses, and the best step, are since then"
    report("done", result)
    lines, folder = [], shlex.quote(str(final))
    tool = "inspect-lora" if shutil.which("inspect-lora") else "python -m inspect_lora"
    if tool == "inspect-lora" or Path("inspect_lora").is_dir():
        sha256 = (job.data.facts["held_out"] or {}).get("sha256")
        rules = " --rules data/rules.json" if sha256 == SHIPPED["held_out"] else ""
        lines += [f"# what it gained, and what else it changed:\n{tool} evidence {folder}{rules}"]
        lines += [f"# talk to it:\n{tool} chat {folder}"]
    config = read_json(final / "adapter_config.json")
    is_old = torch.cuda.is_initialized() and torch.cuda.get_device_capability() < (8, 0)
    if is_old or config["use_dora"] or config["modules_to_save"]:
        lines += [f"# vLLM cannot serve it here; for Python see {folder}/README.md"]
    else:
        for_vllm = job.output / "final_lora_vllm"
        served = for_vllm if for_vllm.is_dir() else final
        rank = max([config["r"], *config["rank_pattern"].values()])
        template = final / "chat_template.jinja" if job.settings.CHAT_TEMPLATE else ""
        which = (job.settings.MODEL_NAME, job.base.commit, served, rank)
        lines += [f"# serve it:\n{vllm_command(*which, template, job.base.enable_thinking)}"]
    report("next", "\n".join(lines))


def vllm_command(
    model: str, revision: str, adapter: Path, rank: int, template: str | Path, thinks: bool
) -> str:
    """Return the command that serves an adapter; template is "" for the base's own."""
    allowed = next((each for each in VLLM_RANKS if each >= rank), rank)
    words = ["vllm", "serve", model]
    words += ["--revision", revision] if revision else []
    words += ["--enable-lora", "--max-lora-rank", str(allowed)]
    words += ["--lora-modules", f"adapter={adapter}"]
    words += ["--chat-template", str(template)] if template else []
    words += ["--default-chat-template-kwargs", json.dumps({"enable_thinking": thinks})]
    return shlex.join(words)
