"""The acceptance of a card: what only a GPU can show, in ten minutes, in one file to send back.

    python tests/accept_gpu.py        writes acceptance.json, and says where to look first

The script trains random weights of Qwen3.5-4B's real sizes as a user would; then comes what it
relied on, each check in a process of its own, which an error on the card would spoil for others.
16 GB of the card's memory suffice, and 9 GB for temporary files; nothing is downloaded.
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
from pathlib import Path
from timeit import default_timer, repeat
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
SCRIPT, DEMO = ROOT / "train_lora_single.py", ROOT / "data" / "demo-model"
SECONDS, STEPS, GIB = 600, 20, 2**30
GRADIENTS_APART, LOSSES_APART = 0.12, 0.01  # two good kernels are 2 % apart, a bad one some 100 %
ROW_ERROR = 0.005  # of a product: rounded to float16, then to bfloat16, it errs by 0.44 % at most
QWEN_4B = {"hidden_size": 2560, "intermediate_size": 9216, "tie_word_embeddings": True}
Row = tuple[str, str, bool | None]  # what, what was found, is it good; None: not judged


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
    command = ["timeout", "-k", "45", str(seconds), *command] if seconds else command
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **given) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            printed += line
            if stop_at and stop_at in line:
                process.terminate()
    return process.returncode, printed


def bare_command(flags: list[str], folder: Path) -> Iterator[Row]:
    """Train as a user does; SIGTERM comes in the middle, and then the same command again."""
    words = [SCRIPT, *flags, f"--output_dir={folder}/one"]
    status, _ = run(words, stop_at=f"step {STEPS // 2}/")
    saved = len([*folder.glob("one/checkpoints/*/checkpoint-*")])
    yield "SIGTERM", f"status {status}, {saved} checkpoint", (status, saved) == (143, 1)
    status, printed = run(words)
    text, losses = left_by_a_run(folder / "one")
    is_good = status == 0 and len(losses) == STEPS + 2 and "step 1/" not in printed
    yield "finished and verified", text, is_good


def two_processes(flags: list[str], folder: Path) -> Iterator[Row]:
    """Train the same with two processes, where there are two GPUs; dropout differs."""
    if torch.cuda.device_count() > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        status, _ = run([*launch, SCRIPT, *flags, f"--output_dir={folder}/two"])
        (_, alone), (text, losses) = left_by_a_run(folder / "one"), left_by_a_run(folder / "two")
        apart = max(abs(one / two - 1) for one, two in zip(alone, losses, strict=True))
        yield "losses of one process", f"{apart:.2%} apart, {text}", status == 0 and apart <= 0.05


def left_by_a_run(output: Path) -> tuple[str, list[float]]:
    """Return what a run's record says, and all its losses; none unless the adapters are there."""
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    losses = [x[key] for x in record["loss_history"] for key in ("loss", "eval_loss") if key in x]
    is_good = len([*output.glob("final_lora*/adapter_model.safetensors")]) == 2
    is_good &= record["outcome"] == "finished" and all(map(math.isfinite, losses))
    text = f"{record['outcome']}, {record['matmul']}, {record['peak_gib']} GiB, losses {losses}"
    return text, losses if is_good else []


def trainer_for(flags: list[str]) -> Any:
    """Return the script's trainer, without dropout, after it has found what fits."""
    import train_lora_single as t  # not before: it chooses fla as the model's code is imported

    job = t.Job(t.parse_settings([*flags, "--lora_dropout=0"]))
    t.prepare_device(job.settings)
    for prepare in (t.read_model_files, t.read_data, t.make_plan):
        prepare(job)
    trainer = t.build_trainer(job)
    t.find_what_fits(trainer, job)
    return trainer


def a_step(trainer: Any, place: float = 0.5) -> tuple[float, torch.Tensor]:
    """Do a step of examples from a place in the order of lengths; return loss and gradient."""
    import train_lora_single as t

    by_length = sorted(trainer.job.examples, key=lambda example: len(example.input_ids))
    first = round(place * (len(by_length) - trainer.args.train_batch_size))
    inputs = t.pad(by_length[first : first + trainer.args.train_batch_size], trainer.args.device)
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, inputs, (inputs["labels"][:, 1:] != -100).sum())
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    return loss.item(), torch.cat([weight.grad.flatten().cpu() for weight in weights])


def gradient(trainer: Any, folder: Path) -> Iterator[Row]:
    """Time a step; compare its loss and LoRA's gradient with the native ones, which come first."""
    if trainer.job.settings.USE_FLA and sys.modules.get("fla", "") is None:
        return  # the log says why
    times = repeat(lambda: a_step(trainer), number=1, repeat=6)
    text = f"{1000 * sorted(times)[2]:.0f} ms a step, {trainer.tokens_at_once:,} tokens at once"
    trainer.tokens_at_once = 64  # all is recomputed, so 9 GiB suffice
    loss, found = a_step(trainer)
    yield "step", text, math.isfinite(loss) and 0 < found.norm().item() < math.inf
    if trainer.job.settings.MATMUL == "native":
        torch.save((loss, found), folder / "native.pt")
    else:
        native, expected = torch.load(folder / "native.pt")
        apart, losses = torch.dist(found, expected) / expected.norm(), abs(loss / native - 1)
        text = f"gradients {apart:.2%} and losses {losses:.3%} from native matmul's"
        yield "gradient", text, apart.item() <= GRADIENTS_APART and losses <= LOSSES_APART


def products(trainer: Any, folder: Path) -> Iterator[Row]:
    """Compare frozen modules with float32 (2.4 GiB for the head), both ways, row by row."""
    import train_lora_single as t

    errors: dict[str, float] = {}

    def judge(name: str, found: Any, rows: torch.Tensor, weight: torch.Tensor) -> None:
        if found is not None:  # nothing goes back to the embedding
            exact = rows.detach().float() @ weight.float()
            length = exact.norm(dim=-1).clamp(min=1e-30)  # a row of padding is 0
            error = (found.detach().float() - exact).norm(dim=-1) / length
            errors[name] = max(errors.get(name, 0.0), error.nan_to_num(math.inf).max().item())

    for path, module in t.fp16_modules(trainer.model.get_base_model()).items():
        module.register_forward_hook(
            lambda own, given, out, path=path: judge(path, out, given[0], own.weight.T)
        )
        module.register_full_backward_hook(
            lambda own, to, came, path=path: judge(f"back {path}", to[0], came[0], own.weight)
        )
    a_step(trainer)
    worst = max(errors, key=errors.__getitem__)
    text = f"{len(errors)} compared; a row of {worst} errs by {errors[worst]:.3%}"
    yield "products", text, errors[worst] <= ROW_ERROR


def memory(trainer: Any, folder: Path) -> Iterator[Row]:
    """Do steps of 32 examples; they must need no more than the limit of the script's two passes."""
    # The two passes had 0.90 of this, and CUDA has loaded kernels since.
    limit = 0.91 * (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    found = trainer.tokens_at_once
    for place in (0, 0.5, 0.9, 1):
        a_step(trainer, place)
    peak = torch.cuda.max_memory_allocated()
    text = f"{found:,} tokens at once; {peak / GIB:.2f} GiB, the passes' limit {limit / GIB:.2f}"
    yield "peak", text, peak <= limit and trainer.tokens_at_once == found


def out_of_memory(trainer: Any, folder: Path) -> Iterator[Row]:
    """Leave a step 1 GiB more than it needs with recomputation, and let it begin whole."""
    trainer.tokens_at_once, whole = 64, 4096
    torch.cuda.reset_peak_memory_stats()
    _, expected = a_step(trainer)
    torch.cuda.empty_cache()
    room = torch.cuda.max_memory_allocated() + GIB
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    trainer.tokens_at_once = whole
    found, fitted = a_step(trainer)[1], trainer.tokens_at_once
    apart = torch.dist(found, expected) / expected.norm()
    text = f"{whole:,} tokens at once became {fitted:,}; gradients {apart:.2%} apart"
    yield "out of memory in a step", text, fitted < whole and apart.item() <= GRADIENTS_APART


CHECKS = {  # what is done, given all flags or the trainer for one more, and where to look first
    "model": ([make_model], "", "the driver, the disk, and what else uses the card"),
    "bare": ([bare_command], "", "the log in acceptance.json"),
    "native": ([gradient], "--matmul=native", "the versions of torch and of the driver"),
    "float16": ([gradient, products], "--matmul=float16", "FP16 MATMUL; or --matmul native"),
    "memory": ([memory, out_of_memory], "--batch_size=16", "MEMORY in the script"),
    "fla": ([gradient], "--use_fla=True", "USE_FLA = False goes without it"),
    "two": ([two_processes], "", "what NCCL says in the log"),
}


def do_check(name: str, folder: str, *flags: str) -> None:
    """Print the rows of a check as lines of JSON."""
    sys.path.insert(0, str(ROOT))
    checks, flag, _ = CHECKS[name]
    given = trainer_for([*flags, flag, f"--output_dir={folder}/{name}"]) if flag else [*flags]
    for check in checks:
        for row in check(given, Path(folder)):
            print("ROW", json.dumps(row), flush=True)


def main() -> int:
    """Do all checks, write acceptance.json after each, and return 1 if one failed."""
    deadline, rows, log = default_timer() + SECONDS, [], ""
    query = "nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv"
    report: dict[str, Any] = {"script_sha256": hashlib.sha256(SCRIPT.read_bytes()).hexdigest()}
    report["cards"] = subprocess.run(query.split(), capture_output=True, text=True).stdout
    report["packages"] = {one.name: one.version for one in importlib.metadata.distributions()}
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--model_name={folder}/model", f"--max_steps={STEPS}", "--logging_steps=1"]
        for name, (_, _, look) in CHECKS.items():
            left = max(1, round(deadline - default_timer()))
            status, printed = run([__file__, name, folder, *flags], seconds=left)
            found = [json.loads(x[4:]) for x in printed.splitlines() if x.startswith("ROW ")]
            if default_timer() > deadline or not (found or status):
                found.append(("", "not done", None))
            elif status != 0:
                found.append(("", f"status {status}: see the log", False))
            rows, log = rows + [(name, *row, look) for row in found], log + printed
            report |= {"rows": rows, "log": log}
            Path("acceptance.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for name, what, found, is_good, _ in rows:
        print({True: "ok", False: "FAILED", None: ""}[is_good].ljust(7), f"{name}: {what} {found}")
    failed = [look for *_, is_good, look in rows if is_good is False]
    print("Please send acceptance.json.", *[f"Look first at {look}." for look in failed[:1]])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) == 1 else do_check(*sys.argv[1:]))
