"""The job files of docs/gpu.md, as bash runs them, and one job on two machines.

Slurm's commands are small scripts in their place. The two machines are launchers on this one.
"""

import contextlib
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, write_short_data
from safetensors.torch import load_file

import train_lora_single as t

PAGE = "docs/gpu.md"

# srun starts its command once on each node, and ends with the highest status. Told so, it kills the
# others when one has failed.
SRUN = """\
set -m
while [[ $1 == --* ]]; do [[ $1 == --kill-on-bad-exit=1 ]] && kills=yes; shift; done
for ((node = 0; node < ${NODES:-1}; node++)); do SLURM_NODEID=$node "$@" & jobs+=($!); done
for job in "${jobs[@]}"; do
    wait -n
    one=$?
    ((one > status)) && status=$one
    [[ $one != 0 && $kills ]] && for job in "${jobs[@]}"; do kill -9 -- "-$job" 2> /dev/null; done
done
exit $((status))
"""
# A call is noted, its words one after the other; python ends with the status that was asked for.
NOTE = 'printf "%s\\t" "${0##*/}" "$@" >> "$NOTES"; echo >> "$NOTES"\n'
PYTHON = NOTE + '[[ $1 == inspect_lora ]] && exit "${MEASURED:-0}"; exit "${TRAINED:-0}"\n'
SBATCH = NOTE + "if [[ $* == *--parsable* ]]; then echo 7; else bash; fi\n"


@pytest.fixture
def cluster(tmp_path):
    """Return a folder with Slurm's commands, and an environment to be activated in it."""
    commands = {"srun": SRUN, "scontrol": NOTE + "echo 127.0.0.1\n", "sbatch": SBATCH}
    for name, text in commands.items():
        write_command(tmp_path / "slurm" / name, text)
    write_command(tmp_path / ".venv/bin/python", PYTHON)
    activate = f"PATH={tmp_path}/.venv/bin:$PATH\n"
    (tmp_path / ".venv/bin/activate").write_text(activate, encoding="utf-8")
    return tmp_path


def write_command(path, text):
    """Write a program for bash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}", encoding="utf-8")
    path.chmod(0o755)


def block(words):
    """Return the one block of the page's code that holds these words."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", Path(PAGE).read_text("utf-8"))
    (found,) = [code for code in blocks if words in code]
    return found


def submit(cluster, code, *flags, **variables):
    """Run a job file as Slurm does; return its end, and the commands that it called."""
    notes = cluster / "notes"
    notes.unlink(missing_ok=True)
    job = {"SLURM_CPUS_PER_TASK": "4", "SLURM_JOB_ID": "7", "NOTES": str(notes)}
    path = f"{cluster / 'slurm'}:{os.environ['PATH']}"
    environment = os.environ | job | {"PATH": path} | variables
    end = subprocess.run(
        ["bash", "-c", code, "job", *flags],
        cwd=cluster, env=environment, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    called = notes.read_text("utf-8").splitlines() if notes.exists() else []
    return end, [line.rstrip("\t").split("\t") for line in called]


# ==== job files


def test_the_job_file_passes_flags_on_and_goes_back_into_the_queue_at_its_limit(cluster):
    code = block("--output=lora-%j.log")
    assert "--max_seq_len" not in code  # each job has its own
    assert re.search(r"--gres=gpu:\w+:1\b", code)
    flags = ["--max_seq_len", "1472", "--output_dir", "output/a try"]
    end, called = submit(cluster, code, *flags)
    assert (end.returncode, end.stderr) == (0, "")
    ((program, script, *words),) = called
    assert (program, script) == ("python", "train_lora_single.py")
    settings = t.parse_settings(words)
    assert (settings.MAX_SEQ_LEN, settings.OUTPUT_DIR) == (1472, "output/a try")

    end, called = submit(cluster, code, TRAINED="138")
    assert end.returncode == 138 and called[1:] == [["scontrol", "requeue", "7"]]
    # A limit that is shorter than loading takes saves nothing, and must not requeue for ever.
    end, called = submit(cluster, code, TRAINED="138", SLURM_RESTART_COUNT="20")
    assert end.returncode == 138 and len(called) == 1
    end, called = submit(cluster, code, TRAINED="1")
    assert end.returncode == 1 and len(called) == 1


def test_the_array_trains_and_measures_three_rates_and_a_job_after_it_compares(cluster):
    code = block("--output=rates-%A_%a.log")
    (first, last) = re.search(r"--array=(\d)-(\d)", code).groups()
    found = {}
    for task in range(int(first), int(last) + 1):
        number = {"SLURM_ARRAY_TASK_ID": str(task)}
        end, called = submit(cluster, code, "--max_seq_len", "1472", **number)
        assert (end.returncode, end.stderr) == (0, "")
        (_, _, *trained), (_, package, command, adapter, *_) = called
        settings = t.parse_settings(trained)
        assert settings.MAX_SEQ_LEN == 1472
        assert (package, command) == ("inspect_lora", "evidence")
        assert Path(adapter) == Path(settings.OUTPUT_DIR) / "final_lora"
        found[settings.OUTPUT_DIR] = settings.LEARNING_RATE
    assert len({*found.values()}) == len(found) == 3
    assert t.LEARNING_RATE in found.values()

    # The limit may come while it trains, or while it measures.
    # One task has the id of the whole array, so only number and task name this one alone.
    task = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}
    for variables in ({"TRAINED": "138"}, {"MEASURED": "138"}):
        end, called = submit(cluster, code, **task, **variables)
        assert end.returncode == 138 and called[-1] == ["scontrol", "requeue", "7_2"]
    end, called = submit(cluster, code, **task, TRAINED="138", SLURM_RESTART_COUNT="20")
    assert end.returncode == 138 and len(called) == 1
    end, called = submit(cluster, code, SLURM_ARRAY_TASK_ID="2", TRAINED="1")
    assert end.returncode == 1 and len(called) == 1  # what failed is not measured

    for folder in found:
        (cluster / folder).mkdir(parents=True)
    end, called = submit(cluster, block("--dependency"))
    assert (end.returncode, end.stderr) == (0, "")
    swept, after, compared = called
    assert swept[:3] == ["sbatch", "--parsable", "rates.sh"]
    assert "--dependency=afterok:7" in after
    assert compared == ["python", "inspect_lora", "compare", *sorted(found)]


# ==== several GPUs and machines

# A launcher that is stopped: it may write a record, and ends with a status.
TORCHRUN = (
    NOTE
    + """\
[[ $RECORD ]] && printf '{"outcome": "%s"}' "$RECORD" > output/mine/run.json
exit "${TRAINED:-0}"
"""
)
STOPPED = "interrupted: Stopped after step 9 of 16. The same command resumes from it."
FAILED = "failed: CUDA is out of memory"


def job_of_several_machines():
    """Return the page's file for several GPUs, with the srun for several machines in its place."""
    code, several = block("--standalone --nproc-per-node 2 \\"), block("--kill-on-bad-exit")
    (replaced,) = re.findall(r"(?ms)^srun .*?[^\\]\n", code)
    return code.replace(replaced, several)


@pytest.mark.parametrize("kind", ["GPUs", "machines"])
def test_a_launched_job_goes_back_into_the_queue_only_if_this_start_was_stopped(cluster, kind):
    """Else one that fails before it writes its record would be put back for ever."""
    write_command(cluster / "slurm/torchrun", TORCHRUN)
    write_command(cluster / "slurm/sleep", NOTE)
    code = block("--standalone --nproc-per-node 2 \\")
    if kind == "machines":
        code = job_of_several_machines()
    requeues = []
    # The first start fails, with no record at all; the third one leaves that of the second.
    for record, status in ((None, 1), (STOPPED, 1), (None, 1), (FAILED, 1), (STOPPED, 0)):
        variables = {"TRAINED": str(status), "RECORD": record or ""}
        end, called = submit(cluster, code, **variables)
        assert (end.returncode, end.stderr) == (status, "")
        requeues.append(["scontrol", "requeue", "7"] in called)
        (launched,) = [words for words in called if words[0] == "torchrun"]
        place = launched.index("train_lora_single.py")
        assert t.parse_settings(launched[place + 1 :]).OUTPUT_DIR == "output/mine"
        assert (["sleep", "30"] in called) == (kind == "machines" and status == 1)
        assert [path.name for path in cluster.glob("output/*")] == ["mine"]  # no mark is left
    assert requeues == [False, True, False, False, False]


def test_a_machine_that_fails_ends_the_job_of_all(cluster):
    waits = NOTE + '[[ $PET_NODE_RANK == 1 ]] && exit 3\nexec "$(command -pv sleep)" 600\n'
    write_command(cluster / "slurm/torchrun", waits)
    write_command(cluster / "slurm/sleep", NOTE)
    began = time.monotonic()
    end, called = submit(cluster, job_of_several_machines(), NODES="2")
    assert end.returncode != 0 and time.monotonic() - began < 60
    assert ["scontrol", "requeue", "7"] not in called


def test_two_jobs_on_the_same_machines_take_other_ports(cluster):
    write_command(cluster / "slurm/torchrun", TORCHRUN)
    ports = set()
    for job in ("4999999", "5000000"):
        _, called = submit(cluster, job_of_several_machines(), SLURM_JOB_ID=job)
        (launched,) = [words for words in called if words[0] == "torchrun"]
        ports.add(int(launched[launched.index("--master-port") + 1]))
    assert len(ports) == 2 and all(1024 < port < 32768 for port in ports)


def job_with_a_free_port():
    """Return a job's number from which the page makes a port that no program listens at now."""
    while True:
        job = random.SystemRandom().randrange(10_000)
        with socket.socket() as server, contextlib.suppress(OSError):
            server.bind(("127.0.0.1", 20_000 + job))
            return str(job)


def test_two_machines_with_one_output_folder_are_one_job(cluster):
    """The page's file for Slurm, with two nodes that are this machine."""
    code = job_of_several_machines()
    output = cluster / "output/mine"
    flags = [*write_short_data(cluster), "--max_steps", "4"]
    torchrun = f'exec {shlex.quote(sys.executable)} -m torch.distributed.run "$@"\n'
    write_command(cluster / "slurm/torchrun", torchrun)
    code = code.replace("train_lora_single.py", str(ROOT / "train_lora_single.py"))
    variables = {"NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]", "GLOO_SOCKET_IFNAME": "lo"}
    variables["SLURM_JOB_ID"] = job_with_a_free_port()
    end, _ = submit(cluster, code, *flags, **variables)
    assert end.returncode == 0, end.stdout + end.stderr

    # One prints, and one record, adapter and evaluation come of it.
    assert len(re.findall("(?m)^done ", end.stdout)) == 1
    assert "2 processes share the examples of each step" in end.stdout
    record = json.loads((output / "run.json").read_text("utf-8"))
    assert (record["outcome"], record["device"]) == ("finished", "CPU, 2 processes")
    steps = [one["step"] for one in record["loss_history"] if "loss" in one]
    assert steps == [1, 2, 3, 4]
    evaluated = [one["step"] for one in record["loss_history"] if "eval_loss" in one]
    assert evaluated == [0, 4]
    newest = {path.name for path in (output / "checkpoints/checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= newest
    (adapter,) = output.glob("final_lora/*.safetensors")
    assert all(tensor.isfinite().all() for tensor in load_file(adapter).values())
    assert not [*output.glob("*.new*")]
    assert [path.name for path in cluster.glob("output/*")] == ["mine"]
