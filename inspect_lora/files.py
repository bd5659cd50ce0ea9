"""An adapter's files: where they are, what they say, and the run that wrote them.

Only safetensors files are read: an adapter_model.bin is a pickle, which could run code. Nothing
here needs the base model, transformers or the trainer's script.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inspect_lora.common import (
    InspectError,
    file_sha256,
    one_line,
    path_from_here,
    read_json,
    without_nan,
)

if TYPE_CHECKING:
    import torch

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
PREFIX = "base_model.model."  # of each tensor's name in a file that PEFT wrote
# Where a model for images and text has the layers of the text model, and where that has them alone.
# PEFT takes these as load_adapter(key_mapping=...), which leaves out the prefix.
KEY_MAPPING = {r"^model\.language_model\.": "model.", r"^language_model\.model\.": "model."}
POINTER = b"version https://git-lfs"  # how a file begins where Git LFS has not fetched it
# The end of the name of a quantized copy, as other trainers record it.
QUANTIZED_NAME = re.compile(
    r"(?i)[-_.](?:unsloth-)?(?:bnb-)?(?:[2-8]bit|int[48]|bnb|gptq|awq|gguf|exl2|"
    r"(?:mx|nv)?(?:fp|nf)[48]|w[48]a(?:8|16))(?:[-_.][^/]*)?$"
)


def find_adapter(name: str) -> Path:
    """Return the folder of an adapter's files, which may be on the hub; it need not be whole."""
    folder = Path(name)
    if not os.path.isdir(folder):  # which answers of any text
        if os.path.exists(folder) or not HUB_NAME.fullmatch(name):
            raise InspectError(
                f"There is no adapter {name}: give the folder that holds adapter_config.json, or a "
                "name on the hub such as someone/adapter."
            )
        folder = download_adapter(name)
    if not (folder / "adapter_config.json").is_file():
        inner = [path.parent for path in sorted(folder.glob("*/adapter_config.json"))]
        hint = f" Did you mean {inner[0]}?" if inner else ""
        if (folder / "config.json").is_file():
            hint = " It looks like a whole model; an adapter is saved by PEFT's save_pretrained()."
        raise InspectError(f"{name} is no adapter: it holds no adapter_config.json.{hint}")
    if (folder / "adapter_model.safetensors").is_file():
        return folder
    if (folder / "adapter_model.bin").is_file():
        raise InspectError(
            f"{name} holds adapter_model.bin, a pickle that could run code when it is opened. "
            "If you trust where it comes from, convert it in that folder:\npython -c "
            "'import torch, safetensors.torch as s; s.save_file({k: v.contiguous() for k, v in "
            'torch.load("adapter_model.bin", map_location="cpu", weights_only=True).items()}, '
            '"adapter_model.safetensors")\''
        )
    raise InspectError(f"{name} holds no adapter_model.safetensors, so its weights are missing.")


def download_adapter(name: str) -> Path:
    """Return the folder on this machine of an adapter that is on the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    wanted = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(name, allow_patterns=wanted, ignore_patterns=["checkpoint-*"])
        )
    except (OSError, HfHubHTTPError, HTTPError) as error:
        raise InspectError(
            f"There is no folder {name}, and no adapter of this name on the Hugging Face hub, or "
            f"the hub cannot be reached ({one_line(error)})."
        ) from error


def path_of_adapter(adapter: str, place: Path) -> str:
    """Return what tells an adapter from others: its path, or its name on the hub."""
    return str(place.resolve()) if Path(adapter).is_dir() else adapter


def read_adapter_config(place: Path) -> dict[str, Any]:
    """Return adapter_config.json; it must be of PEFT, and of a LoRA."""
    saved = read_json(place / "adapter_config.json")
    if not saved or "peft_type" not in saved:
        raise InspectError(
            f"{place / 'adapter_config.json'} is damaged, or was not written by PEFT."
        )
    if saved["peft_type"] != "LORA":
        raise InspectError(
            f"{place} is an adapter of the kind {saved['peft_type']}; only LORA is understood here."
        )
    return saved


def read_tensors(place: Path) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that its file has, in its order."""
    import safetensors.torch

    path = place / "adapter_model.safetensors"
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        with suppress(OSError), path.open("rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise InspectError(
                    f"{path} is a pointer of Git LFS, and not the tensors that it stands for: "
                    f"git -C {shlex.quote(str(place))} lfs pull"
                ) from error
        raise InspectError(
            f"{path} cannot be read ({one_line(error)}). Copy or download it again."
        ) from error
    if not tensors:
        raise InspectError(f"{path} holds no tensors, so the adapter changes nothing.")
    return tensors


def name_in_text_model(name: str) -> str:
    """Return a tensor's name as it is where the text model is loaded alone."""
    inner = name.removeprefix(PREFIX)
    for pattern, replacement in KEY_MAPPING.items():
        inner = re.sub(pattern, replacement, inner)
    return PREFIX + inner


def path_in_text_model(name: str) -> str:
    """Return a module's path where the text model is loaded alone."""
    return name_in_text_model(PREFIX + name).removeprefix(PREFIX)


def folder_to_serve(place: Path) -> Path:
    """Return the folder for a server: the one under vLLM's names, if a run wrote it beside."""
    own = place.resolve()  # it may be given as "."
    renamed = own.with_name("final_lora_vllm")
    return renamed if own.name == "final_lora" and renamed.is_dir() else place


@dataclass
class Run:
    """The run of train_lora_single.py that an adapter comes from."""

    path: Path  # its run.json
    record: dict[str, Any]  # what is in it

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, by the names of the script's constants."""
        return self.record["settings"]

    @property
    def holds_out_lines(self) -> bool:
        """Whether it held out some lines of its training file, with an EVAL_FILE like "10%"."""
        return str(self.settings.get("EVAL_FILE") or "").strip().endswith("%")


def find_run(place: Path) -> Run | None:
    """Return the run that an adapter comes from, or None for one of another trainer.

    A published adapter is known by its hash, which run.json holds, also where both were renamed
    together; a checkpoint by its place, and a renamed one (checkpoints.DATE) by its losses.
    """
    folder = place.resolve()
    if folder.parent.name == "checkpoints":
        of_now = [one for one in runs_in(folder.parent.parent) if one.path.name == "run.json"]
        return of_now[0] if of_now else None
    if folder.parent.name.startswith("checkpoints."):
        return run_of_renamed(folder)
    sha256 = file_sha256(folder / "adapter_model.safetensors")
    for run in runs_in(folder.parent):
        hashes = run.record.get("adapter_sha256")
        if isinstance(hashes, dict) and sha256 in hashes.values():
            return run
    return None


def runs_in(folder: Path) -> list[Run]:
    """Return the runs whose records lie in a folder, also those that later runs renamed."""
    read = ((path, read_json(path)) for path in sorted(folder.glob("run.json*")))
    return [
        Run(path, record)
        for path, record in read
        if record
        and isinstance(record.get("settings"), dict)
        and isinstance(record.get("data", {}), dict)  # or it is of another program
    ]


def run_of_renamed(checkpoint: Path) -> Run | None:
    """Return the run of a checkpoint in checkpoints.DATE, or None if it is not known.

    The DATE of run.json.DATE may be another one, since each name tells when that one was changed
    last. But a record holds all that was logged, and a checkpoint what was logged until then; the
    seconds that each step took are among it, so no other run has the same.
    """
    logged = without_nan((read_json(checkpoint / "trainer_state.json") or {}).get("log_history"))
    if not isinstance(logged, list) or not logged:
        return None
    for run in runs_in(checkpoint.parent.parent):
        history = run.record.get("loss_history")
        if isinstance(history, list) and history[: len(logged)] == logged:
            return run
    return None


def why_run_is_unknown(place: Path) -> str:
    """Return why no run is known of an adapter that lies where a run of ours puts one, or ""."""
    folder = place.resolve()
    output, what, is_ours = folder.parent, "holds the hash of this adapter", False
    if folder.parent.name.startswith("checkpoints"):
        output, what = folder.parent.parent, "belongs to this checkpoint"
        is_ours = (folder.parent / "job.json").is_file()
    if find_run(place) or not (is_ours or runs_in(output)):
        return ""
    return f"no run.json in {path_from_here(output)} {what}"


def where_it_is_now(name: str, run: Run) -> str:
    """Return a run's file or folder as it is found from here.

    It was named as seen from the run's working folder, so one of that name here may be another;
    what the run wrote itself, such as the lines that it held out, lies beside its run.json,
    wherever that was moved to.
    """
    there, here = Path(run.record.get("working_folder", "")) / name, Path(name)
    found = [path for path in (there, run.path.parent / here.name) if path.exists()]
    is_here = not found or (here.exists() and here.samefile(found[0]))
    return name if not name or is_here else str(found[0])


def find_base(config: dict[str, Any], place: Path, run: Run | None, revision: str | None) -> str:
    """Return the base that is recorded as a folder here or a name for the hub, or "" if neither.

    A relative path was seen from the folder that the training was started in. The adapter was
    mostly written below that one, so it is looked for above the adapter, the nearest first.
    """
    base = str(config.get("base_model_name_or_path") or "")
    if run and not revision:  # the run had it in a folder
        base = where_it_is_now(base, run)
    if base and not Path(base).is_dir():
        above = (folder / base for folder in place.resolve().parents)
        base = next((str(path) for path in above if (path / "config.json").is_file()), base)
    is_on_hub = is_hub_name(base) and (revision or not run)
    return base if base and (Path(base).is_dir() or is_on_hub) else ""


def can_load_quantized(is_by_bitsandbytes: bool) -> bool:
    """Return whether a quantized copy can be loaded here: only by the package that made it."""
    return is_by_bitsandbytes and has_bitsandbytes()


def has_bitsandbytes() -> bool:
    """Return whether the package that loads 4-bit copies is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def is_hub_name(base: str) -> bool:
    """Return whether base may be the name of a model on the hub; some are without an owner."""
    return bool(re.fullmatch(rf"[\w-][\w.-]*|{HUB_NAME.pattern}", base))
