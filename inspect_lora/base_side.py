"""What the base model lost and said before: a second adapter of the same base need not ask again.

It is taken from an earlier evidence.json only if all that it depends on is the same: the base's
files, type, device and matmuls, the versions of what computes, and the tokens of each held-out
reply and each prompt. Three of its losses are computed again, since a number that was edited would
become a gain.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import peft
import torch
import transformers

from inspect_lora.adapters import Adapter
from inspect_lora.common import hash_of, path_from_here, report_sentence
from inspect_lora.evidence_file import Evidence, read_evidence
from inspect_lora.replies import Reply
from inspect_lora.scores import losses_of
from inspect_lora.trainer import FILES_THAT_COUNT, Example, file_fingerprints, script_sha256

# By how much a loss that is computed again may differ, in nats a token: it goes through the model
# beside other replies than before. In bfloat16, on a CPU, the largest of 48 differences was 0.021.
SAME_IN_FLOAT32 = 1e-3
SAME_IN_16_BITS = 5e-2


class BaseSide:
    """What the base model lost and said, as far as earlier records have it."""

    def __init__(self, adapter: Adapter, folder: Path) -> None:
        """Read the records beside the folder of the report, and those in the working folder."""
        self.adapter = adapter
        self.losses_from = "measured now"
        self.computed_with = how_the_base_computes(adapter)
        paths = [folder / "evidence.json"]
        for place in (folder.parent, Path("inspected")):
            paths += sorted(place.glob("[!.]*/evidence.json"))
        read = map(read_evidence, dict.fromkeys(path.resolve() for path in paths))
        same = [one for one in read if one and one.base_side.computed_with == self.computed_with]
        self.records = sorted(same, key=lambda one: one.measured) if self.computed_with else []

    def losses(self, examples: list[Example]) -> list[float] | None:
        """Return the base's losses of these replies, in nats, if a record has them.

        A record whose losses are not those of now is not used for anything.
        """
        wanted = hash_of_tokens(examples)
        for one in reversed(self.records):
            if one.base_side.examples != wanted or len(one.losses) != len(examples):
                continue
            if differs := self.what_differs(one, examples):
                self.records = [other for other in self.records if other is not one]
                report_sentence("base", f"{differs}, so that file is not used")
                continue
            self.report("its losses are", {one.folder})
            path = path_from_here(one.folder / "evidence.json")
            self.losses_from = f"taken from {path} of {one.measured}"
            return [row.base * row.tokens for row in one.losses]
        return None

    def what_differs(self, record: Evidence, examples: list[Example]) -> str:
        """Return the first of three losses that is another one now, in words, or "" if none is.

        These are the highest, the lowest and the middle one's: an edit that matters is mostly one
        of the first two.
        """
        order = sorted(range(len(examples)), key=lambda number: record.losses[number].base)
        numbers = sorted({order[0], order[-1], len(examples) // 2})
        some = [examples[number] for number in numbers]
        with self.adapter.model.disable_adapter():
            losses = losses_of(self.adapter.model, some, "base, again")
        is_float32 = self.adapter.dtype == "float32" and self.adapter.matmul == "native"
        most = SAME_IN_FLOAT32 if is_float32 else SAME_IN_16_BITS
        for number, example, loss in zip(numbers, some, losses, strict=True):
            earlier, now = record.losses[number].base, loss / len(example.reply_ids)
            if not abs(earlier - now) <= most:
                return (
                    f"{path_from_here(record.folder / 'evidence.json')} has the loss "
                    f"{earlier:.4f} for {path_from_here(example.source)}, and it is {now:.4f} now"
                )
        return ""

    def replies(self, prompts: list[list[int]], max_new_tokens: int) -> dict[int, Reply]:
        """Return {number: the base's likeliest reply} of those prompts that records have."""
        known: dict[str, tuple[Reply, Path]] = {}
        for one in self.records:
            for key, row in zip(one.base_side.prompts, one.replies, strict=False):
                if row.max_new_tokens == max_new_tokens and row.base.tokens:
                    said = Reply(row.base.text, bool(row.base.ended), [], row.base.tokens)
                    known[key] = said, one.folder
        keys = map(hash_of, prompts)
        found = {number: known[key] for number, key in enumerate(keys) if key in known}
        if found:
            text = f"{len(found)} of its {len(prompts)} replies are"
            self.report(text, {folder for _, folder in found.values()})
        return {number: reply for number, (reply, _) in found.items()}

    def report(self, what: str, folders: set[Path]) -> None:
        """Say where something was taken from."""
        where = ", ".join(sorted(path_from_here(one / "evidence.json") for one in folders))
        same = "base, type, versions and tokens are the same"
        report_sentence("base", f"{what} those in {where}: {same}")


def how_the_base_computes(adapter: Adapter) -> dict[str, str]:
    """Return what the base's numbers depend on but for the tokens; nothing if it is not known."""
    place = Path(adapter.base)
    files = []
    if place.is_dir():
        # Of large files the fingerprint has the ends alone.
        weights = place.glob("*.safetensors")
        times = sorted((path.name, path.stat().st_mtime_ns) for path in weights)
        files = [file_fingerprints(place, FILES_THAT_COUNT), times]
    is_commit = len(adapter.revision) == 40
    if not files and not is_commit:  # a branch may be another commit tomorrow
        return {}
    device = adapter.model.device
    return {
        "base": hash_of(files) if files else f"{adapter.base}@{adapter.revision}",
        "dtype": adapter.dtype,
        "matmul": adapter.matmul,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "delta_kernels": kernels_of(adapter),
        "stop_token_ids": repr(adapter.chat_format.stop_token_ids),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "script": script_sha256(),
    }


def kernels_of(adapter: Adapter) -> str:
    """Return what computes DeltaNet's layers: torch, or fla and its version; "" without them."""
    if not adapter.delta_kernels.startswith("fla"):
        return adapter.delta_kernels and "torch"
    return f"fla {importlib.metadata.version('fla-core')}"


def hash_of_tokens(examples: list[Example]) -> str:
    """Return what tells these replies and their prompts from others."""
    return hash_of([(one.prompt_ids, one.reply_ids) for one in examples])
