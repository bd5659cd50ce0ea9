"""An adapter's own files: its configuration, and modules with A, B and a scaling.

Only safetensors files are read: an adapter_model.bin is a pickle, which could run code. numpy and
safetensors are all that this needs: no torch, no base model.
"""

import functools
import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from inspect_lora.common import InspectError, one_line, read_json, some

PREFIX = "base_model.model."  # of each tensor's name in a file that PEFT wrote
# Where a model for images and text has the layers of its text model, and where that has them alone:
# AutoModelForCausalLM loads the text model of Qwen3.5, and all of Gemma 3 from 4B on. PEFT takes
# these as load_adapter(key_mapping=...), which leaves out the prefix.
TO_TEXT_MODEL = {r"^model\.language_model\.": "model.", r"^language_model\.model\.": "model."}
TO_WRAPPER = {
    r"^language_model\.model\.": "model.language_model.",
    r"^model\.(?=layers\.|embed_tokens|norm)": "model.language_model.",
}
# PEFT's names. Those of a state_dict() have the adapter's name in them, which is mostly "default".
PARTS = r"(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.default)?(?:\.weight)?"
# The first number in a path is the layer's; that of an expert comes later.
IN_A_LAYER = re.compile(r".*?\.(?P<layer>\d+)\.")
# numpy has no bfloat16: its bits are the upper half of a float32's.
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Keys of adapter_config.json that ask for more than A and B, and initialisations (PEFT's names)
# that take something from the base's own weights.
MORE_THAN_LORA = ("use_dora", "lora_bias", "target_parameters", "modules_to_save", "kasa_config")
MORE_THAN_LORA += ("trainable_token_indices", "alora_invocation_tokens", "layer_replication")
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# How the names of quantized copies end, such as -bnb-4bit, -GPTQ-Int4, -AWQ or -FP8.
QUANTIZED_NAME = re.compile(
    r"(?i)[-_.](?:unsloth-)?(?:bnb-)?(?:[2-8]bit|int[48]|bnb|gptq|awq|gguf|exl2|"
    r"(?:mx|nv)?(?:fp|nf)[48]|w[48]a(?:8|16))(?:[-_.][^/]*)?$"
)


@dataclass
class Module:
    """One A (r x in) and B (out x r) of a file, and the scaling that PEFT gives their product."""

    path: str  # the module's, as the file has it
    target: str  # the last part of the path, such as q_proj
    layer: int | None  # its number; None of a module that is in no layer
    a: np.ndarray
    b: np.ndarray
    names: tuple[str, str]  # of the two tensors in the file
    r: int  # as the configuration says
    alpha: float
    scaling: float

    @property
    def is_zero(self) -> bool:
        """Whether the update is 0, since A or B is; before training B is."""
        return not (self.a.any() and self.b.any())

    @property
    def fits(self) -> bool:
        """Whether A and B have the rank of the configuration."""
        return self.a.shape[0] == self.b.shape[1] == self.r

    @functools.cached_property
    def squares(self) -> np.ndarray:
        """The squares of the singular values of scaling x B A, the largest first; none of NaN."""
        if not (self.fits and np.isfinite(self.a).all() and np.isfinite(self.b).all()):
            return np.zeros(0)
        return np.square(self.scaling * strongest_directions(self.a, self.b, None)[1])

    @property
    def norm(self) -> float | None:
        """The size of the update (its Frobenius norm), or None if it cannot be computed."""
        return math.sqrt(self.squares.sum()) if len(self.squares) else None

    @property
    def directions(self) -> int | None:
        """How many directions hold 90 % of the update's square; None of one that is 0."""
        missing = self.squares.cumsum() < 0.9 * self.squares.sum()
        return int(missing.sum()) + 1 if self.norm else None


@dataclass
class SavedAdapter:
    """What an adapter's folder holds."""

    place: Path
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]  # under the names that the file has; bfloat16 as float32
    types: dict[str, str]  # of the same tensors in the file, in its words, such as "BF16"

    @functools.cached_property
    def pairs(self) -> dict[str, dict[str, str]]:
        """The names of the tensors "A" and "B" of each module, by its path."""
        found: dict[str, dict[str, str]] = {}
        for name, tensor in self.tensors.items():
            match = re.fullmatch(re.escape(PREFIX) + PARTS, name)
            if match and tensor.ndim > 1:
                found.setdefault(match["path"], {})[match["part"]] = name
        return found

    @functools.cached_property
    def modules(self) -> list[Module]:
        """Its modules, in the order of the layers."""
        modules = []
        for path, parts in self.pairs.items():
            if len(parts) == 2:
                names = (parts["A"], parts["B"])
                # Of a convolution these have four dimensions; flattened, B A is the same update.
                a, b = (self.tensors[name].reshape(len(self.tensors[name]), -1) for name in names)
                number = IN_A_LAYER.match(path)
                place = (path, path.rpartition(".")[2], int(number["layer"]) if number else None)
                modules.append(Module(*place, a, b, names, *self.scaling_of(path)))
        return sorted(modules, key=lambda one: -1 if one.layer is None else one.layer)

    def scaling_of(self, path: str) -> tuple[int, float, float]:
        """Return a module's r, alpha and scaling, found in the patterns as PEFT does."""
        values = []
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            keys = self.config[pattern]
            fitting = (keys[key] for key in keys if re.match(rf"(.*\.)?({key})$", path))
            values.append(next(fitting, self.config[default]))
        r, alpha = values
        return r, alpha, alpha / (math.sqrt(r) if self.config.get("use_rslora") else r)

    @property
    def more(self) -> list[str]:
        """What it holds or asks for besides A and B of linear modules; then it has no parts."""
        found = [key for key in MORE_THAN_LORA if self.config.get(key)]
        found += ["bias"] if self.config.get("bias", "none") != "none" else []
        used = {name for one in self.modules for name in one.names}
        found += [name.removeprefix(PREFIX) for name in self.tensors if name not in used]
        return found + [n for n in used if "lora_embedding_" in n or self.tensors[n].ndim > 2]


# ---- Reading


def find_adapter(name: str) -> Path:
    """Return the folder of an adapter's files, which may be on the hub."""
    folder = Path(name)
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        try:
            import huggingface_hub

            wanted = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        except (ImportError, OSError, ValueError) as error:
            raise InspectError(
                f"There is no folder {name}, nor can it be had from the hub ({one_line(error)})."
            ) from error
    if (folder / "adapter_model.safetensors").is_file():
        return folder
    hint = "Give the folder of a LoRA that PEFT saved, or its name on the hub."
    if inner := [str(path.parent) for path in sorted(folder.glob("*/adapter_config.json"))]:
        hint = f"Did you mean {some(inner)}?"
    if (folder / "adapter_model.bin").is_file():
        hint = "adapter_model.bin is a pickle, which could run code: save it anew with PEFT."
    raise InspectError(f"{name} holds no adapter_model.safetensors. {hint}")


def read_adapter(place: Path) -> SavedAdapter:
    """Return what an adapter's folder holds."""
    path = place / "adapter_config.json"
    saved = read_json(path)
    if saved.get("peft_type") != "LORA":
        kind = saved.get("peft_type")
        raise InspectError(f"{path} is missing, damaged, or of another kind than LORA ({kind}).")
    defaults = {"r": 8, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}  # PEFT's
    config = defaults | {key: value for key, value in saved.items() if value is not None}
    return SavedAdapter(place, config, *read_tensors(place / "adapter_model.safetensors"))


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return a file's tensors by name, and their types in the file."""
    tensors, types = {}, {}
    try:
        for name, entry in sorted(safetensors.deserialize(path.read_bytes())):
            kind = types[name] = entry["dtype"]
            values = np.frombuffer(entry["data"], NUMPY_TYPES[kind]).reshape(entry["shape"])
            tensors[name] = values
            if kind == "BF16":
                tensors[name] = (values.astype("<u4") << 16).view("<f4")
    except (OSError, KeyError, safetensors.SafetensorError) as error:  # KeyError: another type
        raise InspectError(
            f"{path} cannot be read ({one_line(error)}). If it has about 130 bytes it is a pointer "
            "of Git LFS: git lfs pull."
        ) from error
    return tensors, types


def report_folder(name: str, place: Path) -> Path:
    """Return where the report of an adapter goes, unless another folder is asked for."""
    if not Path(name).is_dir():  # it is on the hub
        return Path("inspected") / name.replace("/", "--")
    return place.resolve().parent / "inspected" / place.resolve().name


# ---- What is wrong with it


def faults_of(saved: SavedAdapter) -> list[str]:
    """Return what makes an adapter useless or wrong in silence; each begins with its name."""
    if not saved.pairs:
        return [f"no-LoRA: no name is like {PREFIX}... .lora_A.weight: {some(list(saved.tensors))}"]
    modules, tensors = saved.modules, saved.tensors
    start = str(saved.config.get("init_lora_weights")).lower()
    has_experts = saved.config.get("target_parameters")  # they share one A and B
    places = Counter(map(name_in_text_model, tensors))
    is_zero = len(tensors) == 2 * len(modules) and all(one.is_zero for one in modules)
    found = {
        "unpaired: A without B, or B without A": [
            name for parts in saved.pairs.values() if len(parts) < 2 for name in parts.values()
        ],
        "NaN: or infinity": [name for name in tensors if not np.isfinite(tensors[name]).all()],
        "zero: all updates are 0, so nothing is changed": [one.path for one in modules if is_zero],
        "rank: A or B does not have the one that adapter_config.json gives": [
            one.path for one in modules if not one.fits and not has_experts
        ],
        "init_lora_weights: it changed the base's weights, and only those fit": [
            start for kind in CHANGES_THE_BASE if start.startswith(kind)
        ],
        "doubled: a tensor is there twice, and programs differ in which one they take": [
            place for place, count in places.items() if count > 1
        ],
    }
    return [f"{fault}: {some(names)}" for fault, names in found.items() if names]


def name_in_text_model(name: str) -> str:
    """Return a tensor's name, or a module's path, where the text model is loaded alone."""
    return renamed(name, TO_TEXT_MODEL)


def renamed(name: str, mapping: dict[str, str]) -> str:
    """Return a tensor's name, or a module's path, as PEFT changes it by a key_mapping."""
    inner = name.removeprefix(PREFIX)
    for pattern, replacement in mapping.items():
        inner = re.sub(pattern, replacement, inner)
    return inner


def base_of(saved: SavedAdapter) -> str:
    """Return the base that an adapter names, or ""; a relative one is looked for above it."""
    base = str(saved.config.get("base_model_name_or_path") or "")
    if not base or Path(base).is_dir():
        return base
    above = (folder / base for folder in saved.place.resolve().parents)
    return next((str(path) for path in above if (path / "config.json").is_file()), base)


def base_config(saved: SavedAdapter) -> dict[str, Any]:
    """Return the config.json of an adapter's base, if it is on this machine; else {}."""
    base = base_of(saved) or "not named"
    path: Any = Path(base) / "config.json"
    if not path.is_file():
        with suppress(ImportError, ValueError):  # the hub has no such name
            from huggingface_hub import try_to_load_from_cache

            path = try_to_load_from_cache(base, "config.json")
    return read_json(Path(path)) if isinstance(path, str | Path) else {}


def original_of(base: str) -> str:
    """Return the name of the model that a quantized copy was made of, by the copy's name."""
    return QUANTIZED_NAME.sub("", base)


def strongest_directions(a: np.ndarray, b: np.ndarray, rank: int | None) -> tuple[np.ndarray, ...]:
    """Return U (out x rank), the singular values and V (rank x in) of B A, the strongest first.

    With B = Q R and A^T = Q' R' it is B A = Q (R R'^T) Q'^T, so the r x r matrix R R'^T has the
    singular values of B A. So B A itself, which has the size of W, is never formed.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u[:, :rank], sizes[:rank], v[:rank] @ q_a.T
