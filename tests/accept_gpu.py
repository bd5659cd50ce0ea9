"""The acceptance of a card: what only a GPU can show, in ten minutes, in one file to send back.

    python tests/accept_gpu.py        writes acceptance.json, and says where to look first

The demo's model is compared with the CPU. Then the script trains random weights of Qwen3.5-4B's
real sizes as a user would, and what it relied on is tested, each check in a process of its own. It
takes 16 GB of the card's memory and 9 GB for temporary files; nothing is downloaded.
"""

import hashlib
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from subprocess import PIPE, STDOUT
from timeit import default_timer, repeat
from typing import Any

import peft
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_lora_single as script
from inspect_lora.model import load_weights
from train_lora import environment
from train_lora.base import read_base
from train_lora.command import Session
from train_lora.data import read_data
from train_lora.device import prepare_device
from train_lora.fp16_matmul import use_fp16_matmul, uses_fp16_matmul
from train_lora.jobs import request_of
from train_lora.losses import token_losses
from train_lora.memory import find_what_fits
from train_lora.tokens import Example, pad

SCRIPT, DEMO = ROOT / "train_lora_single.py", ROOT / "data" / "demo-model"
SECONDS, STEPS, LONG, GIB = 585, 20, 2048, 2**30  # the last check has 15 more seconds to end
# In the demo's model on a CPU bfloat16 and scaled float16 move no weight's gradient by over 5 %. In
# large random weights two good kernels are 2 % apart, and a bad one some 100 %.
IN_FLOAT32, IN_OWN_TYPE, GRADIENTS_APART, LOSSES_APART = 0.01, 0.15, 0.12, 0.01
QWEN_4B = {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True}
Row = tuple[str, str, bool | None]  # what, what was measured, is it good; None: not judged


def compare_with_cpu(flags: list[str], _: Path) -> Iterator[Row]:
    """Compare the demo's model with float32 on the CPU: in float32, and as a run computes.

    Both kinds of matmul share convolution, triangular solve, SDPA and norms: only this judges them.
    """
    environment.prepare()
    settings = script.parse_settings(vars(script), [*flags, f"--model_name={DEMO}"])
    prepare_device(settings)
    base = read_base(request_of(settings))
    by_length = sorted(read_data(settings, base).examples, key=lambda x: len(x.input_ids))
    examples = by_length[:: -(len(by_length) // 3)]  # the longest, and three shorter ones
    lora = peft.LoraConfig(**script.lora_fields(settings) | {"target_modules": "all-linear"})

    def compute(device: str, dtype: str) -> dict[str, torch.Tensor]:
        model = load_weights(str(DEMO), "", dtype, device)
        if dtype == settings.DTYPE and uses_fp16_matmul(base.request, base.config):
            use_fp16_matmul(model)
        model = peft.get_peft_model(model, lora).eval()  # without dropout
        weights = {name: w for name, w in model.named_parameters() if w.requires_grad}
        draw = torch.Generator().manual_seed(0)
        for weight in weights.values():
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=draw))
        loss = token_losses(model, pad(examples, model.device)).mean()
        loss.backward()
        return {"loss": loss.detach().cpu(), **{name: w.grad.cpu() for name, w in weights.items()}}

    exact = compute("cpu", "float32")
    for limit, dtype in ((IN_FLOAT32, "float32"), (IN_OWN_TYPE, settings.DTYPE)):
        apart = {}
        for name, value in compute(settings.DEVICE, dtype).items():
            apart[name] = (torch.dist(value, exact[name]) / exact[name].norm()).item()
        worst = max(apart, key=apart.__getitem__)
        text = f"loss {apart['loss']:.3%}, gradients up to {apart[worst]:.2%} apart ({worst})"
        yield dtype, text, all(share <= limit for share in apart.values())  # a NaN is not


def make_model(_: Any, folder: Path, sizes: Any = QWEN_4B, device: str = "cuda") -> Iterator[Row]:
    """Write random weights (7.9 GiB), with these sizes beside the defaults, in the hub's wrapper.

    In random layers of the usual size no two kernels agree on a gradient. So what a layer adds is
    small beside the embedding's rows, and only an early one makes a few channels massive.
    """
    config = transformers.AutoConfig.from_pretrained(DEMO)
    spread = 0.02 * math.sqrt(2560 / sizes["hidden_size"])
    config.text_config = transformers.Qwen3_5TextConfig(**sizes, initializer_range=spread)
    with torch.device(device), torch.no_grad():
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
        text = model.model.language_model
        text.embed_tokens.weight /= spread
        text.norm.weight.fill_(spread - 1)  # it multiplies by 1 + weight: the logits' size stays
        for name, weight in text.layers.named_parameters():
            if name.endswith(("down_proj.weight", "o_proj.weight", "out_proj.weight")):
                weight /= math.sqrt(2 * len(text.layers))
        text.layers[1].mlp.down_proj.weight[:4] *= 1000
    shutil.copytree(DEMO, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    model.save_pretrained(folder / "model", max_shard_size="2GB")
    yield "parameters", f"{model.num_parameters():,}", None


def run(words: list[Any], stop_at: str = "", seconds: int = 0) -> tuple[int, str]:
    """Run Python; return status and output. SIGTERM comes after a line with stop_at, or seconds."""
    command, printed = [sys.executable, *map(str, words)], ""
    command = ["timeout", "-k", "15", str(seconds), *command] if seconds else command
    with subprocess.Popen(command, stdout=PIPE, stderr=STDOUT, text=True, cwd=ROOT) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            printed += line
            if stop_at and stop_at in line:
                process.terminate()
    return process.returncode, printed


def bare_command(flags: list[str], folder: Path) -> Iterator[Row]:
    """Train as a user does; SIGTERM comes in the middle, and then the same command again."""
    words = [SCRIPT, *flags, f"--output_dir={folder}/bare"]
    status, _ = run(words, stop_at=f"step {STEPS // 2}/")
    saved = len([*folder.glob("bare/checkpoints/*/checkpoint-*")])
    yield "SIGTERM", f"status {status}, {saved} checkpoint", (status, saved) == (143, 1)
    status, printed = run(words)
    record = json.loads((folder / "bare" / "run.json").read_bytes())
    history, session = record["loss_history"], record["sessions"][-1]
    losses = [entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry]
    is_good = status == 0 and "step 1/" not in printed and record["outcome"] == "finished"
    is_good &= len(losses) == STEPS + 2 and all(map(math.isfinite, losses))
    is_good &= len([*folder.glob("bare/final_lora*/adapter_model.safetensors")]) == 2
    text = f"{record['outcome']}, {session['matmul']}, {session['peak_gib']} GiB, losses {losses}"
    yield "finished and verified", text, is_good


def two_processes(flags: list[str], folder: Path) -> Iterator[Row]:
    """Compare a first step without dropout with that of two processes, where there are two GPUs."""
    if torch.cuda.device_count() > 1:
        flags = [SCRIPT, *flags, "--lora_dropout=0", "--max_steps=1", "--eval_file="]
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        run([*flags, f"--output_dir={folder}/one"])
        run([*launch, *flags, f"--output_dir={folder}/two"])
        records = [json.loads((folder / x / "run.json").read_bytes()) for x in ("one", "two")]
        alone, shared = (record["loss_history"][0] for record in records)
        apart = [abs(shared[key] / alone[key] - 1) for key in ("loss", "grad_norm")]
        text = f"loss {apart[0]:.3%}, norm of the gradient {apart[1]:.3%} apart"
        yield "first step", text, max(apart) <= LOSSES_APART


def trainer_for(flags: list[str]) -> Any:
    """Return the script's trainer, without dropout, after it has found what fits."""
    environment.prepare()
    settings = script.parse_settings(vars(script), [*flags, "--lora_dropout=0"])
    prepare_device(settings)
    if settings.USE_FLA and sys.modules.get("fla", "") is None:
        return None  # the log says why
    trainer = script.build_trainer(script.plan_job(settings, Session("now")))
    find_what_fits(trainer)
    return trainer


def a_step(trainer: Any, place: float = 0.5) -> tuple[float, torch.Tensor]:
    """Do a step of examples from a place in the order of lengths; return loss and gradient."""
    by_length = sorted(trainer.job.data.examples, key=lambda example: len(example.input_ids))
    first = round(place * (len(by_length) - trainer.args.train_batch_size))
    return step_of(trainer, by_length[first : first + trainer.args.train_batch_size])


def a_long_step(trainer: Any) -> tuple[float, torch.Tensor]:
    """Do a step of one row of LONG tokens, the data's one after the other; half are targets."""
    tokens = cycle(token for example in trainer.job.data.examples for token in example.input_ids)
    ids = [*islice(tokens, LONG)]
    return step_of(trainer, [Example("made up", [], {}, ids[: LONG // 2], ids[LONG // 2 :])])


def step_of(trainer: Any, examples: list[Any]) -> tuple[float, torch.Tensor]:
    """Do a step of these examples; return loss and gradient."""
    inputs = pad(examples, trainer.args.device)
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, inputs)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return loss.item(), torch.cat([weight.grad.flatten().cpu() for weight in weights])


def gradient(trainer: Any, folder: Path) -> Iterator[Row]:
    """Time a step; compare losses and LoRA's gradients with the native ones, which come first."""
    kept: list[tuple[float, torch.Tensor]] = []
    times = repeat(lambda: kept.append(a_step(trainer)), number=1, repeat=6)
    text = f"{1000 * sorted(times)[2]:.0f} ms a step, {trainer.tokens_at_once:,} tokens at once"
    trainer.tokens_at_once = 64  # all is recomputed, so 9 GiB suffice
    ours = {"gradient": a_step(trainer), f"gradient of {LONG:,} tokens": a_long_step(trainer)}
    is_good = [math.isfinite(loss) and 0 < x.norm().item() < math.inf for loss, x in ours.values()]
    yield "step", text, all(is_good)
    yield "kept, not recomputed", *compared(kept[-1], ours["gradient"])
    native = folder / "native.pt"
    if trainer.job.settings.MATMUL == "native":
        torch.save(ours, native)
    elif native.exists():
        for what, expected in torch.load(native).items():
            text, is_near = compared(ours[what], expected)
            yield what, f"{text} from native matmul's", is_near
    else:
        yield "gradient", "not done: there is none of native matmul", None


def compared(ours: tuple[float, Any], expected: tuple[float, Any]) -> tuple[str, bool]:
    """Return how far loss and gradient are from others, and whether that is near enough."""
    apart = (torch.dist(ours[1], expected[1]) / expected[1].norm()).item()
    losses = abs(ours[0] / expected[0] - 1)
    text = f"gradients {apart:.2%} and losses {losses:.3%} apart"
    return text, apart <= GRADIENTS_APART and losses <= LOSSES_APART


def memory(trainer: Any, folder: Path) -> Iterator[Row]:
    """Do steps of 32 examples; they must need no more than the limit of the script's two passes."""
    # The two passes had 0.90 of this, and CUDA has loaded kernels since.
    limit = 0.91 * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    tokens = trainer.tokens_at_once
    for place in (0, 0.5, 0.9, 1):
        a_step(trainer, place)
    peak = torch.cuda.max_memory_allocated()
    text = f"{tokens:,} tokens at once; {peak / GIB:.2f} GiB, the passes' limit {limit / GIB:.2f}"
    yield "peak", text, peak <= limit and trainer.tokens_at_once == tokens


def out_of_memory(trainer: Any, folder: Path) -> Iterator[Row]:
    """Leave a step 1 GiB more than it needs with recomputation, and let it begin whole."""
    trainer.tokens_at_once, whole = 64, 4096
    torch.cuda.reset_peak_memory_stats()
    _, expected = a_step(trainer)
    torch.cuda.empty_cache()
    room = torch.cuda.max_memory_allocated() + GIB
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    trainer.tokens_at_once = whole
    _, ours = a_step(trainer)
    apart, tokens = torch.dist(ours, expected) / expected.norm(), trainer.tokens_at_once
    text = f"{whole:,} tokens at once became {tokens:,}; gradients {apart:.2%} apart"
    yield "out of memory in a step", text, tokens < whole and apart.item() <= GRADIENTS_APART


CHECKS = {  # what is done, given all flags or the trainer for one more, and where to look first
    "cpu": ([compare_with_cpu], "", "the driver and the versions; the row names a weight"),
    "model": ([make_model], "", "the driver, the disk, and what else uses the card"),
    "bare": ([bare_command], "", "the log in acceptance.json"),
    "native": ([gradient], "--matmul=native", "the versions of torch and of the driver"),
    "float16": ([gradient], "--matmul=float16", "train_lora/fp16_matmul.py; or --matmul native"),
    "memory": ([memory, out_of_memory], "--batch_size=16", "train_lora/memory.py"),
    "fla": ([gradient], "--use_fla=True", "USE_FLA = False goes without it"),
    "two": ([two_processes], "", "what NCCL says in the log"),
}


def do_check(name: str, folder: str, *flags: str) -> None:
    """Print the rows of a check as lines of JSON."""
    checks, flag, _ = CHECKS[name]
    subject = trainer_for([*flags, flag, f"--output_dir={folder}/{name}"]) if flag else [*flags]
    for check in checks if subject else []:
        for row in check(subject, Path(folder)):
            print("ROW", json.dumps(row), flush=True)


def main() -> int:
    """Do all checks, write acceptance.json after each, and return 1 if one failed."""
    deadline, rows, log = default_timer() + SECONDS, [], ""
    query = "nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv"
    report: dict[str, Any] = {"script_sha256": hashlib.sha256(SCRIPT.read_bytes()).hexdigest()}
    if shutil.which("nvidia-smi"):
        report["cards"] = subprocess.run(query.split(), capture_output=True, text=True).stdout
    report["packages"] = {one.name: one.version for one in importlib.metadata.distributions()}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # a run may still save
        flags = [f"--model_name={folder}/model", f"--max_steps={STEPS}", "--logging_steps=1"]
        for name, (_, _, look) in CHECKS.items():
            left = math.ceil(deadline - default_timer())
            words = [__file__, name, folder, *flags]
            status, printed = run(words, seconds=left) if left > 0 else (124, "")
            new = [json.loads(x[4:]) for x in printed.splitlines() if x.startswith("ROW ")]
            if status in (124, 137) or not (new or status):  # as `timeout` ends
                new.append(("", "not done", None))
            elif status != 0:
                new.append(("", f"status {status}: see the log", False))
            rows, log = rows + [(name, *row, look) for row in new], log + printed
            report |= {"rows": rows, "log": log}
            Path("acceptance.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, what, text, is_good, _ in rows:
        print({True: "ok", False: "FAILED", None: ""}[is_good].ljust(7), f"{name}: {what} {text}")
    failed = [look for *_, is_good, look in rows if is_good is False]
    print("Please send acceptance.json.", *[f"Look first at {look}." for look in failed[:1]])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) == 1 else do_check(*sys.argv[1:]))
