"""An adapter's own files: its configuration, and modules with A, B and a scaling.

Only safetensors files are read: an adapter_model.bin is a pickle, which could run code. numpy and
safetensors are all that this needs: no torch, no base model.
"""

import functools
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from inspect_lora.common import InspectError, from_here, one_line, read_json, some

PREFIX = "base_model.model."  # of each tensor's name in a file that PEFT wrote
# Where a model for images and text has the layers of its text model, and where that has them alone:
# AutoModelForCausalLM loads the text model of Qwen3.5, and all of Gemma 3 from 4B on. PEFT takes
# these as load_adapter(key_mapping=...), which leaves out the prefix.
TO_TEXT_MODEL = {r"^model\.language_model\.": "model.", r"^language_model\.model\.": "model."}
TO_WRAPPER = {
    r"^language_model\.model\.": "model.language_model.",
    r"^model\.(?=layers\.|embed_tokens|norm)": "model.language_model.",
}
HUB_NAME = r"[\w-][\w.-]*/[\w.-]+"
ASK_THE_HUB = "to ask the hub needs huggingface_hub: pip install huggingface_hub"
# PEFT's names. Those of a state_dict() have the adapter's name in them, which is mostly "default".
PARTS = r"(?P<path>.+)\.lora_(?:embedding_)?(?P<part>[AB])(?:\.default)?(?:\.weight)?"
# The first number in a path is the layer's; that of an expert comes later.
IN_A_LAYER = re.compile(r".*?\.(?P<layer>\d+)\.")
# numpy has no bfloat16: its bits are the upper half of a float32's.
NUMPY_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Keys of adapter_config.json that ask for more than A and B.
MORE_THAN_LORA = ("use_dora", "lora_bias", "target_parameters", "modules_to_save", "kasa_config")
MORE_THAN_LORA += ("trainable_token_indices", "alora_invocation_tokens", "layer_replication")
MORE_THAN_LORA += ("use_qalora", "use_bdlora")
# Initialisations that PEFT 0.21 subtracts from the base's weights, or for which it rounds them
# (tuners/lora/layer.py). EVA, MiCA and orthogonal ones leave the base alone.
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Bases for images and text to which vLLM 0.32 does not apply the names of their text models, and
# what it refuses to load; both by its source (lora/peft_helper.py, and lora/utils.py for names of
# tensors that trainable tokens and KaSA add). It takes no rank above the last of VLLM_RANKS.
IGNORED_BY_VLLM = ("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "gemma3")
REFUSED_BY_VLLM = {*MORE_THAN_LORA, "bias"} - {"target_parameters"}
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
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
    def squared_singular_values(self) -> np.ndarray:
        """The squares of the singular values of scaling x B A, the largest first; none of NaN."""
        if not (self.fits and np.isfinite(self.a).all() and np.isfinite(self.b).all()):
            return np.zeros(0)
        return np.square(self.scaling * strongest_directions(self.a, self.b, None)[1])

    @property
    def norm(self) -> float | None:
        """The size of the update (its Frobenius norm), or None if it cannot be computed."""
        squares = self.squared_singular_values
        return math.sqrt(squares.sum()) if len(squares) else None

    @property
    def directions_for_90(self) -> int | None:
        """How many directions hold 90 % of the update's square; None of one that is 0."""
        missing = self.squared_singular_values.cumsum() < 0.9 * self.squared_singular_values.sum()
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
        pairs: dict[str, dict[str, str]] = {}
        for name, tensor in self.tensors.items():
            match = re.fullmatch(re.escape(PREFIX) + PARTS, name)
            if match and tensor.ndim > 1:
                pairs.setdefault(match["path"], {})[match["part"]] = name
        return pairs

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
        return sorted(modules, key=lambda module: -1 if module.layer is None else module.layer)

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
    def beyond_lora(self) -> list[str]:
        """What it holds or asks for besides A and B of linear modules; then it has no parts."""
        beyond = [key for key in MORE_THAN_LORA if self.config.get(key)]
        beyond += ["bias"] if self.config.get("bias", "none") != "none" else []
        used = {name for module in self.modules for name in module.names}
        beyond += [name.removeprefix(PREFIX) for name in self.tensors if name not in used]
        return beyond + [n for n in used if "lora_embedding_" in n or self.tensors[n].ndim > 2]


# ---- Reading


def find_adapter(name: str) -> Path:
    """Return the folder of an adapter's files, which may be on the hub."""
    folder = Path(name)
    if not folder.exists() and re.fullmatch(HUB_NAME, name):
        try:
            import huggingface_hub

            wanted = ["adapter_*", "*.json", "*.jinja", "*.model", "*.txt"]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
        except ImportError as error:
            raise InspectError(f"There is no folder {name}; {ASK_THE_HUB}.") from error
        except (OSError, ValueError) as error:
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
    tensors, types, data = {}, {}, b""
    try:
        data = path.read_bytes()
        for name, entry in sorted(safetensors.deserialize(data)):
            kind = types[name] = entry["dtype"]
            values = np.frombuffer(entry["data"], NUMPY_TYPES[kind]).reshape(entry["shape"])
            tensors[name] = values
            if kind == "BF16":
                tensors[name] = (values.astype("<u4") << 16).view("<f4")
    except (OSError, KeyError, safetensors.SafetensorError) as error:  # KeyError: another type
        is_pointer = data.startswith(b"version https://git-lfs")
        hint = "a pointer of Git LFS: git lfs pull" if is_pointer else f"{len(data):,} bytes long"
        raise InspectError(f"{path} cannot be read ({one_line(error)}). It is {hint}.") from error
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
    is_zero = len(tensors) == 2 * len(modules) and all(module.is_zero for module in modules)
    faults = {
        "unpaired: A without B, or B without A": [
            name for parts in saved.pairs.values() if len(parts) < 2 for name in parts.values()
        ],
        "NaN: or infinity": [name for name in tensors if not np.isfinite(tensors[name]).all()],
        "zero: all updates are 0, so nothing is changed": [mod.path for mod in modules if is_zero],
        "rank: A or B does not have the one that adapter_config.json gives": [
            mod.path for mod in modules if not mod.fits and not has_experts
        ],
        "init_lora_weights: it changed the base's weights, and only those fit": [
            start for kind in CHANGES_THE_BASE if start.startswith(kind)
        ],
        "doubled: a tensor is there twice, and programs differ in which one they take": [
            place for place, count in places.items() if count > 1
        ],
    }
    return [f"{fault}: {some(names)}" for fault, names in faults.items() if names]


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


def base_config(base: str) -> tuple[dict[str, Any], str]:
    """Return the config.json of a base, or of a quantized one's original; or {}, and why.

    It is looked for in a folder, in the cache of the hub, and on the hub if there is one.
    """
    names = dict.fromkeys(filter(None, (base, original_of(base))))
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE", Path(home, "hub")))
    for name in names:
        inside = cache / f"models--{name.replace('/', '--')}" / "snapshots"
        for path in (Path(name, "config.json"), *inside.glob("*/config.json")):
            if path.is_file():
                return read_json(path), ""
    reason = f"{base} is no folder with a config.json" if base else "the adapter names no base"
    for name in names:
        if re.fullmatch(HUB_NAME, name) and not Path(name).exists():
            try:
                from huggingface_hub import hf_hub_download

                return read_json(Path(hf_hub_download(name, "config.json", etag_timeout=3))), ""
            except ImportError:
                reason = f"{name} is neither a folder nor in the cache; {ASK_THE_HUB}"
            except (OSError, ValueError) as error:
                reason = f"{name} cannot be had from the hub ({one_line(error, 100)})"
    return {}, f"{reason}; --base takes the base's folder, or its name on the hub"


def original_of(base: str) -> str:
    """Return the name of the model that a quantized copy was made of, by the copy's name."""
    return QUANTIZED_NAME.sub("", base)


def names_of(saved: SavedAdapter, base: dict[str, Any], reason: str) -> tuple[bool | None, str]:
    """Return whether vLLM up to 0.32 applies tensors of such names, None if not known, and why.

    base is the base's config.json, or {} for that reason: then no advice is given.
    """
    if refused := REFUSED_BY_VLLM.intersection(saved.beyond_lora):
        return False, f"vLLM refuses {some(sorted(refused))}: merge the adapter into its base"
    largest = max([saved.config["r"], *saved.config["rank_pattern"].values()])
    if largest > VLLM_RANKS[-1]:
        limit = VLLM_RANKS[-1]
        return False, f"vLLM refuses r = {largest}; `export --rank {limit}` writes a copy for it"
    is_of_wrapper = any("language_model." in module.path for module in saved.modules)
    which = "a model for images and text" if is_of_wrapper else "a text model"
    names = f"those of {which}"
    if not base:
        return None, f"{names}; whether vLLM applies them is not known: {reason}"
    is_wrapper = "text_config" in base
    if is_of_wrapper and not is_wrapper:
        return False, f"{names}, but the base is a text model: vLLM ignores them without a word"
    if is_of_wrapper == is_wrapper:
        return True, f"{names}, as the base is: vLLM applies them"
    if base.get("model_type") not in IGNORED_BY_VLLM:
        return None, f"{names}; whether vLLM applies them to this base, `served` tells"
    beside = saved.place.resolve().with_name("final_lora_vllm")
    serve = from_here(beside) if beside.is_dir() else "what `export --vllm` writes"
    ignored = "the base takes images, too, and vLLM up to 0.32 ignores them without a word"
    return False, f"{names}; {ignored}; serve {serve}"


def strongest_directions(a: np.ndarray, b: np.ndarray, rank: int | None) -> tuple[np.ndarray, ...]:
    """Return U (out x rank), the singular values and V (rank x in) of B A, the strongest first.

    With B = Q R and A^T = Q' R' it is B A = Q (R R'^T) Q'^T, so the r x r matrix R R'^T has the
    singular values of B A. So B A itself, which has the size of W, is never formed.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.astype(np.float64).T)
    u, sizes, v = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ u[:, :rank], sizes[:rank], v[:rank] @ q_a.T
