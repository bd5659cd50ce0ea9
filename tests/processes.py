"""Commands in forks of a process that has done the imports, which take six seconds each time."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
MODEL_CODE = "transformers.models.qwen3_5.modeling_qwen3_5"
FORKS.set_forkserver_preload(["pytest", "matplotlib.figure", "trl.trainer.sft_trainer", MODEL_CODE])
REAL_RUN = subprocess.run


def run_in_a_fork(words, *, cwd, env=None, input="", **others):
    """Do what subprocess.run() does, for `python FILE ...` and `python -m MODULE ...`.

    Any other command is given to it.

    A command with a PYTHONPATH of its own is given to it, too: what is installed there must be
    seen while the packages are imported.
    """
    environment = dict(os.environ if env is None else env)
    is_plain = environment.get("PYTHONPATH", "") == os.environ.get("PYTHONPATH", "")
    is_known = words[1] == "-m" or words[1].endswith(".py")
    if words[0] != sys.executable or not is_known or not is_plain:
        return REAL_RUN(words, cwd=cwd, env=env, input=input, **others)
    with tempfile.TemporaryDirectory() as folder:
        said, printed, errors = (Path(folder) / name for name in ("said", "printed", "errors"))
        errors.touch()
        if others.get("stderr") == subprocess.STDOUT:
            errors = printed
        said.write_text(input, encoding="utf-8")
        process = FORKS.Process(
            target=be_the_command,
            args=(words[1:], str(cwd), environment, str(said), str(printed), str(errors)),
        )
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
            process.join()
        text, complaints = (one.read_text(encoding="utf-8") for one in (printed, errors))
    return subprocess.CompletedProcess(
        words, process.exitcode, text, "" if errors == printed else complaints
    )


def be_the_command(words, cwd, environment, said, printed, errors):
    """Be that command in this process: read its input from one file, write into two others."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_RDONLY), 0)
    for number, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has closed it
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
