"""What a run has learnt, its picture, runs beside each other, the best epoch, and the chat."""

import argparse
import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import types
from pathlib import Path

import matplotlib.figure
import pytest
import torch
import transformers
import trl
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import Linear, Module, ModuleDict, ModuleList
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import GenerationMixin

import train_lora_single as t

TENSORS = "adapter_model.safetensors"


def record_of(output):
    return json.loads((output / "run.json").read_text("utf-8"))


def last_log(output):
    """Return what the newest run into output has logged."""
    return (output / "all_logs.log").read_text("utf-8").split("\n---- 2")[-1]


def flat(learnt):
    """Return what measure_update() found as one list of rows."""
    return [{"target": target, **row} for target, rows in learnt.items() for row in rows]


def section(text, name):
    """Return the lines of the only section of this name, each without its first nine columns."""
    (found,) = re.findall(rf"^{name:<9}.*\n(?: {{9}}.*\n)*", text, re.MULTILINE)
    return [line[9:] for line in found.splitlines()]


def listing(folder):
    """Return all that a write below folder would change."""
    paths = [folder, *folder.rglob("*")]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


def status(argv):
    """Return the status with which the command ends."""
    try:
        t.main([str(word) for word in argv])
    except SystemExit as stop:
        return stop.code
    return 0


# ==== Learnt


def net(shapes, dtype=torch.float32, **lora):
    """Return LoRA with random A and B over one up_proj of d x k a layer, and these modules."""
    model = Module()
    layers = [ModuleDict({"up_proj": Linear(k, d, bias=False)}) for d, k in shapes]
    model.layers = ModuleList(layers)
    adapted = get_peft_model(model.to(dtype), LoraConfig(target_modules=["up_proj"], **lora))
    modules = [layer["up_proj"] for layer in adapted.base_model.model.layers]
    for module in modules:
        torch.nn.init.normal_(module.lora_B["default"].weight)
    return adapted, modules


def by_hand(a, b, scale, weight):
    """Return update, half and directions of the full product."""
    product = scale * b.double() @ a.double()
    energy = torch.linalg.svdvals(product)[: len(a)] ** 2
    shares = (energy / energy.sum()).tolist()
    return {
        "update": (product.norm() / weight.double().norm()).item(),
        "half": sum(shares[: max(1, len(a) // 2)]),
        "directions": next(n for n in range(1, 99) if sum(shares[:n]) >= 0.9),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r,alpha", [(8, 16), (5, 1), (1, 4), (50, 50)])
def test_the_update_is_measured_against_w_as_by_the_full_product(dtype, r, alpha):
    torch.manual_seed(1)
    model, modules = net([(40, 50), (3, 30), (30, 3)], dtype, r=r, lora_alpha=alpha)
    rows = flat(t.measure_update(model))
    assert [(row["layer"], row["target"]) for row in rows] == [(n, "up_proj") for n in range(3)]
    for row, module in zip(rows, modules, strict=True):
        weight, (a, b) = module.get_base_layer().weight, (module.lora_A, module.lora_B)
        assert weight.dtype == dtype
        expected = by_hand(a["default"].weight, b["default"].weight, alpha / r, weight)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_a_w_as_large_as_the_real_models_is_measured_as_closely():
    """Float32 sums of so many squares lose a thousandth."""
    torch.manual_seed(2)
    model, (module,) = net([(4096, 4096)], torch.bfloat16, r=1, lora_alpha=1)
    (row,) = flat(t.measure_update(model))
    weight, (a, b) = module.get_base_layer().weight, (module.lora_A, module.lora_B)
    size = a["default"].weight.double().norm() * b["default"].weight.double().norm()
    assert row["update"] == pytest.approx((size / weight.double().norm()).item(), rel=1e-5)


def test_an_update_of_two_equal_directions_saved_with_r_8_shows_two(tmp_path):
    torch.manual_seed(3)
    model, (module,) = net([(40, 50)], r=8, lora_alpha=16)
    strengths = torch.tensor([0.0, 3, 0, 0, 0, 0, 3, 0])
    a, b = (torch.linalg.qr(torch.randn(n, 8)).Q for n in (50, 40))
    mix = torch.linalg.qr(torch.randn(8, 8)).Q  # so that no row is zero
    module.lora_A["default"].weight.data = mix @ torch.diag(strengths) @ a.T
    module.lora_B["default"].weight.data = b @ mix.T
    model.save_pretrained(tmp_path)
    base = Module()
    base.layers = ModuleList([ModuleDict({"up_proj": module.get_base_layer()})])
    (row,) = flat(t.measure_update(PeftModel.from_pretrained(base, tmp_path)))
    assert row["directions"] == 2 and row["half"] == pytest.approx(1, abs=1e-6)
    size = 2 * 3 * 2**0.5 / module.get_base_layer().weight.norm().item()  # alpha / r is 2
    assert row["update"] == pytest.approx(size, rel=1e-5)


def test_no_update_has_size_0_and_no_directions():
    model, (module,) = net([(40, 50)], r=8, lora_alpha=16)
    module.lora_B["default"].weight.data.zero_()
    (row,) = flat(t.measure_update(model))
    assert (row["update"], row["half"], row["directions"]) == (0, 0, 0)


def learnt_by_hand(adapter, model_name, scale):
    """Return {(target, layer): values} of a saved adapter, by the full product."""
    tensors, found = load_file(adapter / TENSORS), {}
    base = AutoModelForCausalLM.from_pretrained(model_name, dtype="float32")
    for name in [name for name in tensors if "lora_A" in name]:
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        layer, target = int(re.search(r"layers\.(\d+)\.", path)[1]), path.split(".")[-1]
        found[target, layer] = by_hand(a, b, scale, base.get_submodule(path).weight)
    return found


def assert_learnt(output, tiny, scale):
    """Fail unless run.json's numbers are those of final_lora, each module's once."""
    rows = flat(record_of(output)["learnt"])
    expected = learnt_by_hand(output / "final_lora", tiny, scale)
    assert len(rows) == len(expected) == 10
    for row in rows:
        values = expected.pop((row["target"], row["layer"]))
        assert {key: row[key] for key in values} == pytest.approx(values, rel=1e-5)


def test_run_json_tells_of_each_adapted_module_what_is_true_of_the_saved_file(demo, tiny):
    assert_learnt(demo[0], tiny, 16 / 8)


def means(rows):
    """Return {target: (update, directions, half)} over layers."""
    found = {}
    for target in {row["target"] for row in rows}:
        mine = [row for row in rows if row["target"] == target]
        keys = ("update", "directions", "half")
        found[target] = [sum(row[key] for row in mine) / len(mine) for key in keys]
    return found


def assert_section(lines, rows, r):
    """Fail unless each target has one line, with the means of its rows."""
    assert len(lines) <= 10 and max(len(line) + 9 for line in lines) <= 100
    for target, (update, directions, half) in means(rows).items():
        (line,) = [line for line in lines if line.split()[0] == target]
        assert f" {100 * update:.3g} " in line and f" {directions:.1f} of {r} " in line
        assert line.endswith(f" {half:.0%}")


def test_the_printed_section_has_each_targets_means_between_proof_and_samples(demo):
    assert_section(section(demo[1], "learnt"), flat(record_of(demo[0])["learnt"]), 8)
    words = [line.split()[0] for line in demo[1].splitlines() if line[:1].isalpha()]
    assert words.index("proof") < words.index("learnt") < words.index("samples")


def test_for_32_layers_the_section_is_as_short_and_names_the_layers_that_changed_most(
    monkeypatch, capsys
):
    torch.manual_seed(4)
    sizes = dict(zip(t.LORA_TARGET_MODULES, torch.rand(7, 32).tolist(), strict=True))
    found = {
        target: [
            {"layer": n, "update": size, "half": size / 2, "directions": n % 9}
            for n, size in enumerate(row)
        ]
        for target, row in sizes.items()
    }
    monkeypatch.setattr(t, "measure_update", lambda _: found)
    t.report_learnt(None, t.Job(argparse.Namespace(lora_r=128)), None)
    lines = section(capsys.readouterr().out, "learnt")
    assert_section(lines, flat(found), 128)
    for target, row in sizes.items():
        most = sorted(range(32), key=lambda n: -row[n])[:3]
        (line,) = [line for line in lines if line.startswith(f"{target} ")]
        assert f" {', '.join(map(str, most))} " in re.sub(" +", " ", line)


def test_of_an_expert_the_layers_number_is_told():
    experts = ModuleDict({"experts": ModuleList([ModuleDict({"up_proj": Linear(9, 8)})])})
    model = Module()
    model.layers = ModuleList([Module(), experts])
    adapted = get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    assert [row["layer"] for row in flat(t.measure_update(adapted))] == [1]


# ==== lora.png


@pytest.mark.parametrize("fault", ["drawing", "measuring"])
def test_what_cannot_be_drawn_or_measured_is_a_warning_and_no_older_picture_stays(
    lines, tmp_path, monkeypatch, capsys, fault
):
    def savefig(*_):
        raise OSError(28, "No space left")

    def svdvals(*_):
        raise torch.linalg.LinAlgError("did not converge")

    if fault == "drawing":
        monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    else:
        monkeypatch.setattr(torch.linalg, "svdvals", svdvals)
    output = tmp_path / "output"
    output.mkdir()
    (output / "lora.png").write_bytes(b"older")
    flags = [*lines(tmp_path, train=2, evaluation=2), "--num_epochs", "1"]
    assert status([*flags, "--output_dir", output]) == 0
    text = capsys.readouterr().out
    warned = [line for line in text.splitlines() if line.startswith("warning")]
    error = {"drawing": "No space left", "measuring": "did not converge"}[fault]
    name = {"drawing": "lora.png", "measuring": "learnt"}[fault]
    assert name in warned[0] and error in warned[0]
    record = record_of(output)
    assert record["outcome"] == "finished" and bool(record["learnt"]) == (fault == "drawing")
    assert (output / "final_lora" / TENSORS).exists() and (output / "samples.md").exists()
    (aside,) = output.glob("lora.png.2*")
    assert aside.read_bytes() == b"older"


# ==== The best epoch


@pytest.fixture(scope="module")
def with_losses(lines, tmp_path_factory):
    """Return a function that runs the job with these eval losses: of the base, of each epoch.

    It may do something at the last evaluation, and returns the status.
    """
    flags = lines(tmp_path_factory.mktemp("data"), train=2)  # one step an epoch

    def run(output, *more, losses, at_last=lambda: None):
        def prediction_step(trainer, *_, **__):
            step = trainer.state.global_step
            if step == len(losses) - 1:
                at_last()
            return torch.tensor(losses[step]), None, None

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trl.SFTTrainer, "prediction_step", prediction_step)
            epochs = ["--num_epochs", len(losses) - 1, "--num_samples", 0]
            return status([*flags, *epochs, "--output_dir", output, *more])

    return run


@pytest.fixture(scope="module")
def two_runs(with_losses, tmp_path_factory):
    """Return the outputs of a run that publishes its best epoch, and of another into the same.

    Of the first this is a copy; the picture's figures of both come with them.
    """
    output, first = (tmp_path_factory.mktemp(name) for name in ("output", "first"))
    figures = []

    def savefig(figure, path):
        figures.append((Path(path).name, figure))
        Path(path).write_bytes(b"picture %d" % len(figures))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", savefig)
        assert with_losses(output, "--publish", "best", losses=(3.0, 2.0, 2.5)) == 0
        shutil.copytree(output, first, dirs_exist_ok=True)
        more = ("--publish", "last", "--lora_alpha", 4, "--learning_rate", 1e-3)
        assert with_losses(output, *more, losses=(2.625, 2.75, 2.875)) == 0
    pictures = [figure for name, figure in figures if name == "lora.png"]
    return types.SimpleNamespace(first=first, second=output, pictures=pictures)


def epoch_of(output, folder="final_lora"):
    """Return the epochs whose adapter a result holds, by its tensors."""
    result = load_file(output / folder / TENSORS)
    result = {name.replace(".language_model.", "."): tensor for name, tensor in result.items()}
    equal = []
    for path in sorted(output.glob("checkpoints/checkpoint-*")):
        with contextlib.suppress(FileNotFoundError, SafetensorError):  # a test has spoilt it
            saved = load_file(path / TENSORS)
            same = saved.keys() == result.keys()
            if same and all(saved[name].equal(result[name]) for name in saved):
                equal.append(int(path.name.removeprefix("checkpoint-")))
    return equal


def test_with_best_the_epoch_of_the_lowest_eval_loss_is_published_proved_and_measured(
    two_runs, tiny
):
    output, text = two_runs.first, last_log(two_runs.first)
    assert epoch_of(output) == epoch_of(output, "final_lora_vllm") == [1]
    assert (output / "checkpoints/checkpoint-2" / TENSORS).exists()  # and holds another one
    assert_learnt(output, tiny, 16 / 8)
    assert "final_lora, of epoch 1 of 2" in section(text, "done")[0] and "\nwarning" not in text
    assert "overfit" not in text  # the later epoch is not what is published


def test_the_base_itself_is_no_epoch_to_publish(with_losses, tmp_path):
    assert with_losses(tmp_path, "--publish", "best", losses=(1.0, 3.0, 2.0)) == 0
    assert epoch_of(tmp_path) == [2]


def test_the_adapter_that_is_proved_is_the_published_one(two_runs, tiny):
    """By the effect that is printed: that of the other epoch is another."""
    row = (two_runs.first / "run.json").read_text("utf-8")
    data = next(path for path in json.loads(row)["data"] if path.endswith("eval.jsonl"))
    messages = json.loads(Path(data).read_text("utf-8").splitlines()[0])
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    how = {"tokenize": False, "enable_thinking": False}
    text = tokenizer.apply_chat_template(messages["prompt"] + messages["completion"], **how)
    ids = tokenizer(text.removesuffix("\n"), add_special_tokens=False)["input_ids"]
    ids, effects = torch.tensor([ids]), []
    for folder in ("final_lora", "checkpoints/checkpoint-2"):
        base = AutoModelForCausalLM.from_pretrained(tiny, dtype="float32").eval()
        with torch.no_grad():
            plain = base(input_ids=ids).logits
            adapted = PeftModel.from_pretrained(base, two_runs.first / folder).eval()
            effects.append((adapted(input_ids=ids).logits - plain).abs().max().item())
    (proof,) = section(last_log(two_runs.first), "proof")
    printed = float(re.search(r"(\S+) from the base's", proof)[1])
    assert printed == pytest.approx(effects[0], rel=0.05)
    assert printed != pytest.approx(effects[1], rel=0.1)


def test_with_last_the_last_epoch_is_published_though_its_loss_rose(two_runs, tiny):
    output, text = two_runs.second, last_log(two_runs.second)
    assert epoch_of(output) == epoch_of(output, "final_lora_vllm") == [2]
    assert (output / "checkpoints/checkpoint-1" / TENSORS).exists()
    assert_learnt(output, tiny, 4 / 8)
    assert "final_lora, of epoch 2 of 2" in section(text, "done")[0]
    assert "\nwarning" not in text


def test_a_second_run_sets_the_older_lora_png_aside_and_draws_what_it_has_learnt(two_runs):
    (aside,) = two_runs.second.glob("lora.png.2*")
    assert aside.read_bytes() == (two_runs.first / "lora.png").read_bytes()
    assert (two_runs.second / "lora.png").read_bytes() not in (b"", aside.read_bytes())
    for output, figure in zip((two_runs.first, two_runs.second), two_runs.pictures, strict=True):
        rows = flat(record_of(output)["learnt"])
        (image,) = [image for axes in figure.axes for image in axes.images]
        drawn = [size for row in image.get_array().tolist() for size in row if size is not None]
        drawn = sorted(size for size in drawn if size == size)  # NaN is a module that is not there
        assert drawn == pytest.approx(sorted(100 * row["update"] for row in rows))


def test_where_the_last_epoch_is_the_best_it_is_published(with_losses, tmp_path):
    assert with_losses(tmp_path, "--publish", "best", losses=(3.0, 2.5, 2.0)) == 0
    assert epoch_of(tmp_path) == epoch_of(tmp_path, "final_lora_vllm") == [2]
    assert "\nwarning" not in last_log(tmp_path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def edit(change):
    """Return what changes the tensors of a file by change(tensors)."""

    def change_file(path):
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return change_file


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b"")])
def test_where_the_best_epochs_file_is_damaged_it_is_said_and_the_last_one_can_be_published(
    with_losses, tmp_path, capsys, damage
):
    def spoil():
        path = tmp_path / "checkpoints/checkpoint-1" / TENSORS
        damage(path)

    assert with_losses(tmp_path, "--publish", "best", losses=(3.0, 2.0, 2.5), at_last=spoil) == 1
    said = capsys.readouterr().err
    assert "a file could not be written or read (" in said and "Traceback" not in said
    assert not (tmp_path / "final_lora").exists()
    assert with_losses(tmp_path, "--publish", "last", losses=(3.0, 2.0, 2.5)) == 0
    assert epoch_of(tmp_path) == epoch_of(tmp_path, "final_lora_vllm") == [2]


def test_the_best_epoch_is_taken_from_the_folder_that_is_trained_in(
    with_losses, tmp_path, monkeypatch
):
    """Stopped in its last step, moved, and another job trained in the old place."""
    losses, old, new = (3.0, 2.0, 2.5), tmp_path / "old", tmp_path / "new"
    flags = ("--publish", "best")

    def stop():
        os.kill(os.getpid(), signal.SIGTERM)

    assert with_losses(old, *flags, losses=losses, at_last=stop) == 143
    old.rename(new)
    assert with_losses(old, *flags, "--seed", 7, losses=losses) == 0
    assert with_losses(new, *flags, losses=losses) == 0
    assert epoch_of(new) == [1] == epoch_of(old)
    for output in (old, new):
        assert "of epoch 1 of 2" in section(last_log(output), "done")[0]
        assert record_of(output)["published"] == "of epoch 1 of 2"
    tensors = [(output / "final_lora" / TENSORS).read_bytes() for output in (old, new)]
    assert tensors[0] != tensors[1]


def test_where_the_best_epochs_checkpoint_is_gone_the_last_is_not_published_in_its_place(
    with_losses, tmp_path, capsys
):
    def remove():
        shutil.rmtree(tmp_path / "checkpoints/checkpoint-1", ignore_errors=True)

    assert with_losses(tmp_path, "--publish", "best", losses=(3.0, 2.0, 2.5), at_last=remove) == 1
    assert f"{tmp_path}/checkpoints/checkpoint-1/{TENSORS}" in capsys.readouterr().err
    assert not (tmp_path / "final_lora").exists()


def test_the_best_epoch_without_an_eval_file_is_refused(lines, tmp_path, capsys):
    flags = lines(tmp_path, train=2, evaluation=0)
    assert status([*flags, "--publish", "best", "--output_dir", tmp_path / "output"]) == 2
    assert "PUBLISH 'best' needs an EVAL_FILE" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


def test_publish_may_be_changed_before_an_interrupted_run_goes_on(with_losses, tmp_path, capsys):
    step = transformers.Trainer.training_step

    def stop_at_third(self, *args, **how):
        if self.state.global_step == 2:
            raise SystemExit("stopped by the test")
        return step(self, *args, **how)

    losses = (3.0, 2.0, 2.5, 2.75)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "training_step", stop_at_third)
        assert with_losses(tmp_path, "--publish", "last", losses=losses) == 1
    assert "stopped by the test" in capsys.readouterr().err
    assert with_losses(tmp_path, "--publish", "best", losses=losses) == 0
    text = last_log(tmp_path)
    assert re.search(r"^resume +from \S+/checkpoint-2$", text, re.MULTILINE)
    assert "of epoch 1 of 3" in section(text, "done")[0] and epoch_of(tmp_path) == [1]


# ==== Runs beside each other


def shown(lines):
    """Return [(eval loss, lowest, minutes, rest)] of the list's lines, without its head."""
    row = re.compile(r" *(\d\.\d{4}) +(\d\.\d{4}) +(\d+\.\d)\+? +(.+)")
    found = [row.fullmatch(line) for line in lines]
    return [(*map(float, one.groups()[:3]), one[4]) for one in found if one]


def test_a_first_run_lists_no_runs(demo, two_runs):
    for text in (demo[1], last_log(two_runs.first)):
        assert not re.search(r"^runs ", text, re.MULTILINE)


def test_a_second_run_lists_both_the_best_first_with_what_differs(two_runs):
    text = last_log(two_runs.second)
    best, other = shown(section(text, "runs"))
    # Of what was published, so that the first one's last epoch does not count; nor does the base.
    assert best[:2] == (2.0, 2.0) and other[:2] == (2.875, 2.75)
    (aside,) = two_runs.second.glob("run.json.2*")
    assert str(aside) in best[3] and re.search(r"/run\.json(?!\.)", other[3])
    for (*_, rest), alpha, rate, kept in ((best, 16, 0.01, "best"), (other, 4, 0.001, "last")):
        assert f"LORA_ALPHA {alpha}  LEARNING_RATE {rate}  PUBLISH {kept}" in rest
        names = {*re.findall(r"\b[A-Z_]{4,}\b", rest)}
        assert names == {"LORA_ALPHA", "LEARNING_RATE", "PUBLISH"}
    assert " (2 of 2: finished, on the newest's data)" in section(text, "runs")[0]
    assert text.index("\nproof ") < text.index("\nruns ")


@pytest.fixture
def put(demo, tmp_path):
    """Return a function that writes the demo's run.json, changed, into a folder in tmp_path."""
    kept = record_of(demo[0])

    def write(where, *, last=2.0, constants=(), without=(), **changes):
        record = {**kept, **changes}
        if "loss_history" not in changes:
            record["loss_history"] = [{"step": 0, "eval_loss": 3.0}, {"step": 8, "eval_loss": last}]
        record["constants"] = {**record["constants"], **dict(constants)}
        record = {key: value for key, value in record.items() if key not in without}
        path = tmp_path / where
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record), encoding="utf-8")
        return path

    return write


def compare(capsys, *folders):
    """Return (status, lines of the list, message) of --compare."""
    capsys.readouterr()
    code = status(["--compare", *folders])
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, shown(section(out, "runs")) if code == 0 else [], err


def test_compare_lists_the_runs_of_several_folders_and_does_nothing_else(
    put, tmp_path, capsys, monkeypatch
):
    put("a/run.json", last=2.25, train_seconds=754, constants={"LORA_R": 4, "OUTPUT_DIR": "a"})
    put("a/run.json.20260101-000000", last=1.5, constants={"LORA_R": 16})
    put("b/run.json", last=2.0, constants={"LORA_R": 8, "OUTPUT_DIR": "b"})
    (tmp_path / "none").mkdir()
    before = listing(tmp_path)
    monkeypatch.setattr(t, "read_examples", lambda _: pytest.fail("a job is run"))
    folders = [tmp_path / name for name in ("a", "b", "none", "no folder")]
    code, rows, err = compare(capsys, *folders)
    assert code == 0 and err == "" and listing(tmp_path) == before
    assert [row[:2] for row in rows] == [(1.5, 1.5), (2.0, 2.0), (2.25, 2.25)]
    assert rows[2][2] == 12.6  # minutes
    paths = ["a/run.json.20260101-000000", "b/run.json", "a/run.json"]
    for (*_, rest), path, r in zip(rows, paths, (16, 8, 4), strict=True):
        assert f"{tmp_path}/{path}" in rest and re.findall(r"\b[A-Z_]{4,}\b", rest) == ["LORA_R"]
        assert re.search(rf"LORA_R {r}\b", rest)


def test_constants_that_differ_are_shown_whole_behind_a_long_path(put, tmp_path, capsys):
    deep = "a-folder-for-the-runs-of-this-study-with-a-long-name"
    targets = [["q_proj", "v_proj"], t.LORA_TARGET_MODULES]
    for name, targeted, rate in zip("ab", targets, (2e-4, 1e-4), strict=True):
        values = {"LORA_TARGET_MODULES": targeted, "LEARNING_RATE": rate}
        put(f"{deep}-{name}/run.json", constants=values)
    _, rows, _ = compare(capsys, *tmp_path.iterdir())
    assert {re.search(r"LEARNING_RATE (\S+?),?(?: |$)", row[3])[1] for row in rows} == {
        "0.0002", "0.0001",
    }  # fmt: skip
    assert len({row[3].partition("LORA_TARGET_MODULES")[2] for row in rows}) == 2


def test_a_run_that_went_on_is_marked_since_its_minutes_are_not_all(put, tmp_path, capsys):
    put("a/run.json", last=2.0, train_seconds=60)
    put("b/run.json", last=2.5, train_seconds=60, resumed_from="b/checkpoints/checkpoint-4")
    status(["--compare", tmp_path / "a", tmp_path / "b"])
    out = capsys.readouterr().out
    assert f" 1.0  {tmp_path}/a" in out and f" 1.0+ {tmp_path}/b" in out


@pytest.mark.parametrize("changed", [0, 1])
@pytest.mark.parametrize("fact", [{"sha256": "0" * 64}, {"tokens": 5}])
def test_runs_on_another_file_or_other_lengths_of_it_are_not_compared(
    demo, put, tmp_path, capsys, changed, fact
):
    data = record_of(demo[0])["data"]
    other = [*data][changed]
    put("a/run.json", last=2.0)
    put("b/run.json", last=1.0, started=0, data=data | {other: data[other] | fact})
    _, rows, _ = compare(capsys, tmp_path / "a", tmp_path / "b")
    assert [row[0] for row in rows] == [2.0]


def test_what_is_not_listed_is_counted(put, tmp_path, capsys):
    put("a/run.json", last=2.0)
    put("a/run.json.20260101-000000", outcome="running")
    put("b/run.json", data={"train.jsonl": {"sha256": "0"}}, started=0)
    status(["--compare", tmp_path / "a", tmp_path / "b"])
    assert " (1 of 3: finished, on the newest's data)" in capsys.readouterr().out


def test_runs_that_do_not_differ_show_no_constant_and_a_folder_given_twice_counts_once(
    put, tmp_path, capsys
):
    put("a/run.json"), put("b/run.json")
    a, b = tmp_path / "a", tmp_path / "b"
    code, rows, _ = compare(capsys, a, b, a)
    assert code == 0 and len(rows) == 2
    assert [re.findall(r"\b[A-Z_]{4,}\b", row[3]) for row in rows] == [[], []]


FOREIGN = ["[]", "[1]", '"text"', "5", "null", "{}", '{"outcome": "finished"}', "", '{"out', "\x00"]
CHANGED = {
    "interrupted": {"outcome": "interrupted: stopped"},
    "running": {"outcome": "running"},
    "failed": {"outcome": "failed: train"},
    "without eval": {"loss_history": [{"step": 1, "loss": 2.0}]},
    "without losses": {"loss_history": []},
    "losses are texts": {"loss_history": ["a", "b"]},
    "losses are a number": {"loss_history": 5},
    "a loss is a text": {"loss_history": [{"eval_loss": 1.0}, {"eval_loss": "NaN"}]},
    "a loss is null": {"loss_history": [{"eval_loss": None}]},
    "data is a list": {"data": ["a"]},
    "another length": {"data": {"a": {"sha256": "1", "tokens": 5}}, "started": 0},
    "data has no hash": {"data": {"train.jsonl": {"examples": 3}}, "started": 0},
    "other data": {"data": {"train.jsonl": {"sha256": "0" * 64}}, "started": 0},
    "time is a text": {"train_seconds": "long"},
    "start is a text": {"started": "today"},
}
KEYS = ["outcome", "loss_history", "data", "constants", "started", "train_seconds"]


def test_foreign_damaged_and_unfinished_files_and_runs_on_other_data_are_passed_over(
    put, tmp_path, capsys
):
    put("a/run.json", last=2.0)
    for number, text in enumerate(FOREIGN):
        (tmp_path / f"a/run.json.foreign-{number}").write_text(text, encoding="utf-8")
    (tmp_path / "a/run.json.latin-1").write_bytes(b'{"outcome": "\xe9"}')
    (tmp_path / "a/run.json.folder").mkdir()
    (tmp_path / "a/run.json.nowhere").symlink_to("nowhere")
    for name, changes in CHANGED.items():
        put(f"a/run.json.{name}", **changes)
    for key in KEYS:
        put(f"a/run.json.no-{key}", without=[key])
    path = put("a/run.json.constants")
    path.write_text(path.read_text("utf-8").replace('"constants": {', '"constants": 5, "x": {'))
    code, rows, err = compare(capsys, tmp_path / "a")
    assert (code, err) == (0, "") and [row[3].split()[0] for row in rows] == [
        f"{tmp_path}/a/run.json"
    ]


def test_a_run_of_an_older_script_without_a_constant_or_what_was_learnt_is_listed(
    put, tmp_path, capsys
):
    path = put("a/run.json", last=1.5, without=["learnt", "products"])
    path.write_text(path.read_text("utf-8").replace('"WARMUP_RATIO"', '"FORMER"'))
    put("b/run.json", last=2.0)
    _, rows, _ = compare(capsys, tmp_path / "a", tmp_path / "b")
    assert [row[0] for row in rows] == [1.5, 2.0] and "WARMUP_RATIO 0.03" in rows[1][3]


@pytest.mark.parametrize("content", [None, "nothing", "unfinished", "without eval"])
def test_compare_of_folders_without_a_finished_run_is_one_message(put, tmp_path, capsys, content):
    if content == "nothing":
        (tmp_path / "a").mkdir()
    elif content:
        history = {"loss_history": [{"step": 1, "loss": 2.0}]}
        put("a/run.json", **({"outcome": "running"} if content == "unfinished" else history))
    code, _, err = compare(capsys, tmp_path / "a", tmp_path / "b")
    assert code == 1 and len(err.splitlines()) == 1
    assert f"{tmp_path}/a" in err and f"{tmp_path}/b" in err and "no finished run" in err


@pytest.mark.parametrize("number", [7, 8, 9, 12])
def test_at_most_eight_runs_are_shown_and_the_others_counted(put, tmp_path, capsys, number):
    for n in range(number):
        put(f"a/run.json.{n:02}", last=1 + n / 10, constants={"SEED": n})
    assert status(["--compare", tmp_path / "a"]) == 0
    lines = section(capsys.readouterr().out, "runs")
    rows = shown(lines)
    assert len(rows) == min(number, 8) or (len(rows), number > 7) == (7, True)
    assert [row[0] for row in rows] == [pytest.approx(1 + n / 10) for n in range(len(rows))]
    more = re.search(r"(\d+) more", lines[-1])
    assert int(more[1] if more else 0) == number - len(rows)


def test_a_run_without_eval_file_is_not_listed_and_lists_no_others(demo, lines, tmp_path, capsys):
    output = tmp_path / "output"
    output.mkdir()
    for n in range(2):
        shutil.copy(demo[0] / "run.json", output / f"run.json.{n}")
    flags = lines(tmp_path, train=13, evaluation=0)
    assert status([*flags, "--num_epochs", 1, "--output_dir", output]) == 0
    text = capsys.readouterr().out
    assert record_of(output)["outcome"] == "finished" and "\nruns " not in text
    code, rows, _ = compare(capsys, output)
    assert code == 0 and len(rows) == 2 and all(f"{output}/run.json." in row[3] for row in rows)


def test_a_run_json_that_cannot_be_written_costs_a_warning_but_not_the_run(with_losses, tmp_path):
    (tmp_path / "run.json.new").mkdir()
    assert with_losses(tmp_path, losses=(3.0, 2.0)) == 0
    assert epoch_of(tmp_path) == [1] and not (tmp_path / "run.json").exists()
    assert "\ndone " in last_log(tmp_path) and "run.json is not written" in last_log(tmp_path)


# ==== Chat

SYSTEM = {"role": "system", "content": "You are a parrot."}
GENERATE = GenerationMixin.generate


@pytest.fixture(scope="module")
def parrot(demo, tiny, lines, tmp_path_factory):
    """Return (flags, output, model folder) of an adapter and a model whose replies differ.

    Those of the demo are nearly the same to all prompts.
    """
    folder = tmp_path_factory.mktemp("parrot")
    model, output = shutil.copytree(tiny, folder / "model"), folder / "output"
    edit(lambda x: [x[n].mul_(3) for n in x if "proj" in n and "language_model" in n])(
        model / "model.safetensors"
    )
    shutil.copytree(demo[0] / "final_lora", output / "final_lora")
    torch.manual_seed(0)
    edit(lambda x: [x[n].normal_(std=0.3) for n in x if "lora_B" in n])(
        output / "final_lora" / TENSORS
    )
    path = output / "final_lora" / "adapter_config.json"
    config = json.loads(path.read_text("utf-8")) | {"base_model_name_or_path": str(model)}
    path.write_text(json.dumps(config), encoding="utf-8")
    (folder / "train.jsonl").write_text(row_with(SYSTEM), encoding="utf-8")
    flags = ["--chat", "--output_dir", str(output), "--device", "cpu", "--dtype", "float32"]
    flags += ["--train_file", str(folder / "train.jsonl"), "--max_new_tokens", "8"]
    return types.SimpleNamespace(flags=flags, output=output, model=str(model))


def row_with(*system):
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    return json.dumps({"messages": [*system, *said]}) + "\n"


def lines_in(said, kind=io.TextIOWrapper):
    """Return these lines as a standard input, which may be of another kind."""
    return kind(io.BytesIO("".join(f"{line}\n" for line in said).encode()), "utf-8")


@pytest.fixture
def talk(parrot, monkeypatch, capsys):
    """Return a function that gives the end of a chat with these lines as its standard input.

    The end has the status, the replies as [(who, text)], the prompts' ids, and what was printed.
    """

    def run(*said, more=(), generate=GENERATE, stdin=None):
        prompts = []

        def spy(self, *given, **how):
            inputs = how["input_ids"] if "input_ids" in how else given[0]
            prompts.append(inputs[0].tolist())
            return generate(self, *given, **how)

        monkeypatch.setattr(GenerationMixin, "generate", spy)
        monkeypatch.setattr(sys, "stdin", stdin or lines_in(said))
        capsys.readouterr()
        code = status([*parrot.flags, *more])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        pieces = re.split(r"^(you|base|adapter)> ?", out, flags=re.MULTILINE)
        pairs = [*zip(pieces[1::2], pieces[2::2], strict=True)]
        replies = [(who, text.removesuffix("\n")) for who, text in pairs if who != "you"]
        return types.SimpleNamespace(
            status=code, replies=replies, prompts=prompts, out=out, err=err
        )

    return run


def ids_of(tokenizer, *turns, system=SYSTEM):
    """Return the ids of user and assistant in turn, as they are served."""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    how = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
    text = tokenizer.apply_chat_template([system] * bool(system) + messages, **how)
    assert text.endswith("assistant\n<think>\n\n</think>\n\n")
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def greedy(model, tokenizer, ids, limit=8):
    """Return the argmax reply to one prompt, without generate() and its cache."""
    new = []
    with torch.no_grad():
        while len(new) < limit and tokenizer.eos_token_id not in new:
            logits = model(input_ids=torch.tensor([ids + new])).logits[0, -1]
            (best, second), (token, _) = logits.topk(2)
            assert best - second > 1e-5, "rounding could change this choice: take another model"
            new.append(token.item())
    return tokenizer.decode(new, skip_special_tokens=True)


def test_adapter_and_base_reply_as_they_do_to_the_prompt_as_served_with_all_said_before(
    parrot, talk
):
    tokenizer = AutoTokenizer.from_pretrained(parrot.model)
    base = AutoModelForCausalLM.from_pretrained(parrot.model, dtype="float32").eval()
    model = PeftModel.from_pretrained(base, parrot.output / "final_lora").eval()
    first = greedy(model, tokenizer, one := ids_of(tokenizer, "what's the time"))
    with model.disable_adapter():
        second = greedy(base, tokenizer, two := ids_of(tokenizer, "what's the time", first, "so?"))
    third = greedy(
        model, tokenizer, three := ids_of(tokenizer, "what's the time", first, "so?", second, "ok")
    )
    fourth = greedy(model, tokenizer, four := ids_of(tokenizer, "what's the time", first, "so?"))
    fifth = greedy(model, tokenizer, five := ids_of(tokenizer, "ok"))
    assert len({first, second, third, fourth, fifth}) == 5
    end = talk(
        "", "what's the time", "/base", "  so?  ", "   ", "/adapter", "ok",
        "/new", "what's the time", "so?", "/new", "ok", "/quit", "not answered",
    )  # fmt: skip
    assert end.status == 0 and "not answered" not in end.out
    assert end.prompts == [one, two, three, one, four, five]
    expected = ["adapter", "base", *["adapter"] * 4]
    assert [who for who, _ in end.replies] == expected
    replies = [first, second, third, first, fourth, fifth]
    assert [reply.removesuffix(" [cut here]") for _, reply in end.replies] == replies


def test_without_a_system_message_in_the_training_data_there_is_none(parrot, talk, tmp_path):
    (tmp_path / "train.jsonl").write_text(row_with(), encoding="utf-8")
    end = talk("hello", more=["--train_file", str(tmp_path / "train.jsonl")])
    tokenizer = AutoTokenizer.from_pretrained(parrot.model)
    assert end.prompts == [ids_of(tokenizer, "hello", system=None)] and end.status == 0


def test_the_end_of_input_ends_it_and_nothing_is_written(parrot, talk):
    before = listing(parrot.output.parent)
    assert before and talk("hello", "/base", "hello").status == 0
    assert talk().status == 0 and listing(parrot.output.parent) == before


def saying(text, tokenizer):
    """Return a generate() whose reply is always this text, with the end of a turn."""
    reply = tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"]

    def generate(self, input_ids, *_, streamer=None, **__):
        for ids in (input_ids[0], *torch.tensor(reply).split(1)):
            streamer.put(ids)
        streamer.end()
        return torch.cat([input_ids, torch.tensor([reply])], 1)

    return generate


def test_without_an_adapter_there_is_one_message_and_no_folder_is_made(parrot, talk, tmp_path):
    for name in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        end = talk("hello", more=["--output_dir", str(tmp_path / name)])
        assert end.status == 1 and len(end.err.splitlines()) == 1
        assert f"{tmp_path}/{name}/final_lora is no adapter, " in end.err
    assert [*tmp_path.iterdir()] == [tmp_path / "empty"] and not [*(tmp_path / "empty").iterdir()]


def test_the_base_is_the_one_that_the_adapter_names_with_its_revision(talk, tmp_path, monkeypatch):
    asked = []

    def resolve_revision(name, revision):
        asked.append((name, revision))
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.resolve_revision", resolve_revision)
    config = {"peft_type": "LORA", "base_model_name_or_path": "a/model", "revision": "abc"}
    (tmp_path / "final_lora").mkdir()
    path = tmp_path / "final_lora" / "adapter_config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    end = talk("hello", more=["--output_dir", str(tmp_path)])
    assert end.status == 1 and "a/model" in end.err and asked == [("a/model", "abc")]


def test_a_command_that_there_is_not_is_no_message(parrot, talk):
    end = talk("/help", "/Base", "/quit now", "hello")
    assert end.status == 0 and len(end.prompts) == 1
    assert len(end.replies) == 1


BROKEN = {
    "config cut": ("adapter_config.json", lambda text: text[:9]),
    "config empty": ("adapter_config.json", lambda text: b"{}"),
    "no base": (
        "adapter_config.json",
        lambda text: re.sub(rb'(el_name_or_path": )"[^"]*"', rb"\1null", text),
    ),
    "another r": ("adapter_config.json", lambda text: re.sub(rb'"r": \d+', b'"r": 3', text)),
    "tensors cut": (TENSORS, lambda tensors: tensors[:-100]),
    "tensors gone": (TENSORS, None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_adapter_is_one_message(parrot, talk, tmp_path, name):
    output = tmp_path / "output"
    shutil.copytree(parrot.output / "final_lora", output / "final_lora")
    file, change = BROKEN[name]
    path = output / "final_lora" / file
    if change:
        path.write_bytes(change(path.read_bytes()))
    else:
        path.unlink()
    end = talk("hello", more=["--output_dir", str(output)])
    err = [line for line in end.err.splitlines() if line and "Loading weights" not in line]
    assert end.status == 1 and len(err) == 1
    assert f"{output}/final_lora is no adapter" in err[0] or "MODEL_NAME None: " in err[0]


def test_a_signal_while_the_chat_loads_says_nothing_of_checkpoints(parrot, talk, monkeypatch):
    def stop(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(t, "load_model", stop)
    end = talk("hello")
    assert end.status == 130 and end.err.endswith("stopped\n")


def test_without_a_standard_output_there_is_one_message(parrot, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    assert status(parrot.flags) == 1
    assert "stdin or stdout is closed" in capsys.readouterr().err


def test_without_a_standard_input_there_is_one_message(parrot, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert status(parrot.flags) == 1
    err = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
    assert len(err) == 1 and "stdin or stdout is closed" in err[0]


def once(action, part="lean half a rep"):
    """Return a generate() in whose first call action() comes after a part of the reply."""
    calls = []

    def generate(self, input_ids, *given, streamer=None, **how):
        calls.append(None)
        if len(calls) == 1:
            tokenizer = streamer.tokenizer
            for ids in (input_ids[0], *torch.tensor(tokenizer(part)["input_ids"]).split(1)):
                streamer.put(ids)
            action()
            time.sleep(5)
            pytest.fail("the signal was not heard")
        return GENERATE(self, input_ids, *given, streamer=streamer, **how)

    return generate


def kill(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_a_reply_ends_the_talk(talk, number):
    end = talk("a story", "hello", generate=once(kill(number)))
    assert end.status == 128 + number and len(end.prompts) == 1
    assert "stopped" in end.err.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_prompt_ends_the_talk(talk, number):
    class Waiting(io.TextIOWrapper):
        def readline(self, *_):
            os.kill(os.getpid(), number)
            time.sleep(5)
            pytest.fail("the signal was not heard")

    end = talk(stdin=lines_in([], Waiting))
    assert end.status == 128 + number and end.prompts == []


def test_a_reply_is_printed_as_it_comes(talk, monkeypatch):
    seen, kind = [], transformers.Qwen3_5ForCausalLM
    forward = kind.forward

    def spy(self, *args, **how):
        seen.append(sys.stdout.getvalue())
        return forward(self, *args, **how)

    monkeypatch.setattr(kind, "forward", spy)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    talk("hello", more=["--max_new_tokens", "24"])
    assert len(seen) == 24 and len(set(seen)) > 4
    assert all(later.startswith(former) for former, later in itertools.pairwise(seen))


def read_until(reader, pattern, seconds=120):
    """Return what the terminal shows, up to pattern."""
    found, until = "", time.monotonic() + seconds
    while not re.search(pattern, found):
        assert select.select([reader], [], [], until - time.monotonic())[0], found
        try:
            found += os.read(reader, 65536).decode("utf-8", "replace")
        except OSError:  # the other end is closed
            pytest.fail(f"ended: {found}")
    return found


def test_on_a_terminal_it_asks_and_is_ended_by_ctrl_c(demo):
    """The real command, which needs no flag for the base."""
    before, (terminal, its) = listing(demo[0]), pty.openpty()
    flags = ["--chat", "--output_dir", str(demo[0]), "--device", "cpu", "--max_new_tokens", "3000"]
    process = subprocess.Popen(
        [sys.executable, "train_lora_single.py", *flags],
        stdin=its, stdout=its, stderr=its, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that ^C is a signal
    )  # fmt: skip
    os.close(its)
    try:
        read_until(terminal, "you> $")
        os.write(terminal, b"caf\xe9\n")  # as when half of a character was deleted
        read_until(terminal, r"adapter> (?s:.{9})")  # it has begun
        os.write(terminal, b"\x03")
        assert "Traceback" not in read_until(terminal, "stopped\r?\n", 20)
        assert process.wait(20) == 130 and listing(demo[0]) == before
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
