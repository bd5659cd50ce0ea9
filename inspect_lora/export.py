"""Write a weaker, a smaller or a renamed copy of an adapter, verified from the written file.

--scale multiplies every update by a number: 0.75 is what /scale 0.75 sounds like in the chat.
--rank keeps the strongest directions of every update, which makes the file smaller. --vllm writes
the names that vLLM applies: up to version 0.32 it accepts others, and ignores them without a word.
They can be given together. --scale and --rank need the adapter's files alone; --vllm needs the
configuration of the base model, but not its weights.
"""

from __future__ import annotations

import argparse
import math
import shlex
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from inspect_lora.common import (
    InspectError,
    one_line,
    pluralize,
    report,
    report_sentence,
    this_program,
    write_json,
)
from inspect_lora.faults import problems_of, reasons_against
from inspect_lora.files import (
    PREFIX,
    find_adapter,
    find_run,
    name_in_text_model,
    read_adapter_config,
    read_tensors,
    where_it_is_now,
)
from inspect_lora.modules import (
    PARTS,
    Module,
    SavedAdapter,
    read_adapter,
    share_kept,
    strongest_directions,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder to write into")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="the strength of every update; 1 is as trained"
    )
    parser.add_argument("--rank", type=int, help="how many directions to keep of every update")
    parser.add_argument("--vllm", action="store_true", help="write the names that vLLM applies")
    parser.add_argument("--base", help="for --vllm: the base model, if the adapter names none")
    parser.add_argument("--base_revision", help="its branch, tag or commit on the hub")


def run(options: argparse.Namespace) -> None:
    """Write the copy beside its place, verify what was written, and move it there."""
    place, folder = find_adapter(options.adapter), Path(options.folder)
    check_options(options, place, folder)
    saved = read_adapter(place)
    refuse_what_is_more(place, options, saved)
    modules = written = saved.modules
    config = read_adapter_config(place)
    if options.rank:
        written = [cut(module, options.rank) for module in written]
    if options.scale != 1:
        written = [scaled(module, options.scale) for module in written]
    if options.rank or options.vllm:
        written = with_one_scaling(written)
    refuse_lossy(modules, written, options.scale)
    server = None
    if options.vllm:
        server = NamesForVllm(options, place)
        written = server.renamed(written)
        config |= server.names_in_config(written)
    has_patterns = bool(config.get("rank_pattern") or config.get("alpha_pattern"))
    if options.rank or (options.vllm and has_patterns):
        config |= ranks_and_alphas(written)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as beside:
            staging = Path(beside) / folder.name
            write(staging, place, written, config)
            verify(staging, written)
            if server:
                server.verify_names(staging)
            staging.rename(folder)
    except (OSError, SafetensorError) as error:
        raise InspectError(f"{folder} cannot be written ({one_line(error)}).") from error
    tell(options, folder, modules, written)
    old, new = (one.get("base_model_name_or_path") for one in (saved.config, config))
    if old != new:
        report_sentence("base", f"its adapter_config.json names {new} now, not {old or 'none'}")
    if server:
        # The same update under other names has the adapter's own evidence.
        asked = folder if options.rank or options.scale != 1 else Path(options.adapter)
        report("next", server.commands(folder, asked, max(one.r for one in written)))
    else:
        report("next", f"{this_program()} info {shlex.quote(str(folder))}")


# ---- What is refused


def check_options(options: argparse.Namespace, place: Path, folder: Path) -> None:
    """Refuse flags that ask for nothing or too much, and a folder that is not new."""
    if options.scale == 1 and options.rank is None and not options.vllm:
        raise InspectError("Say what to write: --scale 0.75, --rank 4, --vllm, or several of them.")
    if not 0 < options.scale <= 10:
        raise InspectError(f"--scale is {options.scale:g}; it must be above 0 and at most 10.")
    if options.rank is not None and options.rank < 1:
        raise InspectError(f"--rank is {options.rank}; it must be at least 1.")
    if folder.resolve() == Path.cwd():
        raise InspectError("FOLDER is where you are; name a new folder, such as weaker.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise InspectError(f"{folder} {what}; give a new folder: nothing is overwritten.")
    if place.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InspectError(f"{folder} lies in the adapter's own folder; give another one.")


def refuse_what_is_more(place: Path, options: argparse.Namespace, saved: SavedAdapter) -> None:
    """Refuse an adapter that is useless or wrong, or whose update is more than scaling x B A."""
    if problems := problems_of(saved):
        raise InspectError("\n".join([f"{place} is not written anew.", *problems]))
    if reasons := reasons_against("scaling", saved):
        raise InspectError(
            f"{place} cannot be scaled, cut or renamed here, since it {'. It '.join(reasons)}."
        )
    largest = max(module.r for module in saved.modules)
    if options.rank and options.rank >= largest:
        raise InspectError(f"--rank {options.rank} cuts nothing: the adapter's rank is {largest}.")


# ---- Weaker, and the strongest directions


def scaled(module: Module, scale: float) -> Module:
    """Return a module whose B, and so its update, is multiplied."""
    return replace(module, b=(scale * module.b.double()).to(module.b.dtype))


def with_one_scaling(modules: list[Module]) -> list[Module]:
    """Return modules that have the most frequent scaling, and in B what is left of their own.

    Older versions of vLLM give every module the common scaling: they read no patterns.
    """
    (common, _), *_ = Counter(module.scaling for module in modules).most_common(1)
    return [replace(scaled(one, one.scaling / common), scaling=common) for one in modules]


def cut(module: Module, rank: int) -> Module:
    """Return a module with the strongest directions of its update, and the same scaling.

    The root of each singular value goes into A and into B.
    """
    if rank >= module.r:
        return module
    u, sizes, v = strongest_directions(module.a, module.b, rank)
    a, b = sizes.sqrt()[:, None] * v, u * sizes.sqrt()
    return replace(module, a=a.to(module.a.dtype), b=b.to(module.b.dtype), r=len(sizes))


def refuse_lossy(modules: list[Module], written: list[Module], scale: float) -> None:
    """Refuse updates that are not what they should be, since the file's type cannot hold them."""
    pairs = zip(written, modules, strict=True)
    wrong = [new for new, old in pairs if not is_right(new, old, scale)]
    if wrong:
        raise InspectError(
            f"The numbers of {pluralize(len(wrong), 'module')}, such as {wrong[0].name}, become "
            f"too large or too small for the type of the file, {wrong[0].b.dtype}, or lose too "
            "many digits in it, so nothing was written. Choose a --scale that is nearer to 1, or "
            "give the adapter in float32."
        )


MOST_ROUNDING = 0.03  # as a share of an update; types of one byte may lose all of it


def is_right(written: Module, module: Module, scale: float) -> bool:
    """Return whether an update is scale times the old one, but for what was cut off.

    Its distance from that may be the directions that were cut off, and no more but for the rounding
    of its type, which is at right angles to them.
    """
    if not written.is_finite:
        return False
    a = torch.cat([written.a.double(), module.a.double()])
    wanted = -scale * module.scaling * module.b.double()
    b = torch.cat([written.scaling * written.b.double(), wanted], dim=1)
    apart = strongest_directions(a, b).sizes.norm().item()
    values = scale * module.scaling * strongest_directions(module.a, module.b).sizes
    types = (torch.float32, written.a.dtype, written.b.dtype)  # no finer than float32's
    eps = max(torch.finfo(one).eps for one in types)
    rounding = min(8 * eps, MOST_ROUNDING) * values.norm().item()
    return apart <= math.hypot(values[written.r :].norm().item(), rounding)


def ranks_and_alphas(modules: list[Module]) -> dict[str, Any]:
    """Return the entries of a configuration that give each module its rank and its scaling.

    The most frequent ones are the common r and alpha, and the others are named module by module.
    The scaling is alpha / r again, also where it was rsLoRA's.
    """
    alphas = [as_whole(module.scaling * module.r) for module in modules]
    (r, alpha), _ = Counter(zip((one.r for one in modules), alphas, strict=True)).most_common(1)[0]
    pairs = list(zip(modules, alphas, strict=True))
    return {
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "rank_pattern": {module.name: module.r for module in modules if module.r != r},
        "alpha_pattern": {module.name: one for module, one in pairs if one != alpha},
    }


def as_whole(number: float) -> float:
    """Return a number as an integer if it is one but for rounding."""
    whole = round(number)
    return whole if math.isclose(number, whole, rel_tol=1e-9) else number


# ---- Writing and verifying


def write(folder: Path, place: Path, modules: list[Module], config: dict[str, Any]) -> None:
    """Write an adapter, with the tokenizer and the chat template that lie beside the old one."""
    folder.mkdir()
    write_json(folder / "adapter_config.json", config)
    tensors = {}
    for module in modules:
        for name, tensor in zip(module.names, (module.a, module.b), strict=True):
            tensors[name] = tensor.contiguous()
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    # It would be readable by its owner alone, but the server may be another user.
    shutil.copymode(folder / "adapter_config.json", path)
    for pattern in TOKENIZER_FILES:
        for file in filter(Path.is_file, place.glob(pattern)):
            shutil.copy2(file, folder)


TOKENIZER_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILES += ("vocab.*", "merges.txt", "*.model")


def verify(folder: Path, written: list[Module]) -> None:
    """Read the file again: PEFT must find each module in it, with its scaling, and no other."""
    found = {module.name: module for module in read_adapter(folder).modules}
    wrong = [one.name for one in written if not is_same(found.pop(one.name, None), one)]
    wrong += found
    if wrong:
        raise InspectError(
            f"What was written is not what was asked for in {pluralize(len(wrong), 'module')}, "
            f"such as {wrong[0]}, so nothing was left there. Is the disk full?"
        )


def is_same(found: Module | None, module: Module) -> bool:
    """Return whether a module was read as it was written."""
    if found is None or not found.fits or not math.isclose(found.scaling, module.scaling):
        return False
    return found.a.equal(module.a) and found.b.equal(module.b)


def tell(
    options: argparse.Namespace, folder: Path, modules: list[Module], written: list[Module]
) -> None:
    """Print what was written."""
    lines = [f"{folder}: {pluralize(len(written), 'module')}"]
    if options.scale != 1:
        lines.append(f"each update is {options.scale:g} times what it was")
    if options.rank:
        lines.append(
            f"of {max(one.r for one in modules)} directions the strongest {options.rank} make up "
            f"{100 * share_kept(modules, options.rank):.1f} % of an update, on average (by square)"
        )
    if len(written) < len(modules):
        missing = pluralize(len(modules) - len(written), "module")
        lines.append(f"left out: {missing} whose update is 0")
    if options.vllm:
        lines.append("each tensor has its place and shape in the base model, under its new name")
    lines.append("the file was read again, and each update is what it should be")
    report("written", "\n".join(lines))


# ---- Names for vLLM


class NamesForVllm:
    """What vLLM needs: the base model's configuration, and names as its model on the hub has them.

    The script is asked, since it writes such names as well; so all of it is imported here.
    """

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        """Find the base model and load its configuration; refuse what vLLM does not serve."""
        from inspect_lora import adapters, trainer

        self.trainer = trainer
        self.run = find_run(place)
        self.base, self.revision = adapters.base_of(options, place, self.run)
        self.config = trainer.load_config(self.base, self.revision)
        lora_config = adapters.lora_config_of(place)
        largest = options.rank or max(lora_config.r, *lora_config.rank_pattern.values(), 0)
        if reason := trainer.why_vllm_refuses(lora_config, largest):
            raise InspectError(f"{place}: {reason}; merge the adapter into its base instead.")

    def renamed(self, modules: list[Module]) -> list[Module]:
        """Return the modules under the server's names, without those whose update is 0.

        Unsloth may put LoRA into the vision tower, where B stays 0 if only text was trained.
        """
        found = []
        for module in modules:
            names = [self.new_name(name) for name in module.names]
            if not module.is_zero:
                path = PARTS.match(names[0].removeprefix(PREFIX))["path"]
                found.append(replace(module, name=path, names=tuple(names)))
        return found

    def new_name(self, name: str) -> str:
        """Return a tensor's name as the server looks for it."""
        name = name_in_text_model(name)
        return (
            self.trainer.name_in_multimodal_model(name)
            if self.trainer.is_multimodal(self.config)
            else name
        )

    def names_in_config(self, modules: list[Module]) -> dict[str, Any]:
        """Return the entries of the configuration that name the base and the targets."""
        targets = sorted({module.target for module in modules})
        return {
            "base_model_name_or_path": self.base,
            "revision": None if self.revision == "main" else self.revision,
            "target_modules": targets,
            "exclude_modules": None,
        }

    def verify_names(self, folder: Path) -> None:
        """Ask a meta-device copy of the server's model for each name that was written."""
        self.trainer.check_names_for_vllm(read_tensors(folder), self.config)

    def commands(self, folder: Path, asked: Path, max_rank: int) -> str:
        """Return the command that serves the written adapter, and the one that asks the server.

        Args:
            folder: what is served.
            asked: the adapter that it is compared with.
            max_rank: of its modules.
        """
        name = self.trainer.name_on_server(folder)
        serve = self.trainer.vllm_command(self.base, self.revision, folder, max_rank, name)
        held_out = "HELD_OUT.jsonl"
        if self.run:
            file = (self.run.record["data"].get("held_out") or {}).get("file")
            held_out = where_it_is_now(file, self.run) if file else held_out
        words = ["served", "http://localhost:8000", str(asked), "--name", name]
        words += ["--eval_file", held_out]
        ask = f"{this_program()} {shlex.join(words)}"
        return f"{serve}\n# Does it apply the adapter? Ask it while it runs:\n{ask}"
