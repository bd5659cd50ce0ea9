"""Commands in forks of a process that has done the imports, which take six seconds each time."""

import fcntl
import multiprocessing
import os
import pty
import runpy
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
MODEL_CODE = "transformers.models.qwen3_5.modeling_qwen3_5"
FORKS.set_forkserver_preload(["pytest", "matplotlib.figure", "trl.trainer.sft_trainer", MODEL_CODE])
REAL_RUN = subprocess.run


def run_in_a_fork(words, *, cwd, env=None, input="", first="", **others):
    """Do what subprocess.run() does, for `python FILE ...` and `python -m MODULE ...`.

    The code in first is run before that. Any other command is given to subprocess.run().

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
            args=(words[1:], str(cwd), environment, first, str(said), str(printed), str(errors)),
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


def be_the_command(words, cwd, environment, first, said, printed, errors):
    """Be that command in this process: read its input from one file, write into two others."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(said, os.O_RDONLY), 0)
    for number, path in ((1, printed), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    exec(first, {})
    be_python(words, cwd)


def begin_on_a_terminal(words, cwd):
    """Begin `python FILE ...` in a fork, on a terminal of 100 columns; return it and our end."""
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    is_opened = FORKS.Event()
    arguments = (words[1:], str(cwd), os.ttyname(its), is_opened)
    process = FORKS.Process(target=be_on_a_terminal, args=arguments)
    process.start()
    assert is_opened.wait(60)
    os.close(its)  # so that reading from our end ends with the process
    return process, own


def be_on_a_terminal(words, cwd, name, is_opened):
    """Be that command in this process, with a terminal that sends it signals."""
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first terminal of a session controls it
    for number in range(3):
        os.dup2(terminal, number)
    os.close(terminal)
    is_opened.set()
    be_python(words, cwd)


def be_python(words, cwd):
    """Do what `python WORDS` does in a folder."""
    os.chdir(cwd)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has closed it
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        # The file's own folder comes first, and those of the tests are not on its path.
        here = Path(__file__).resolve().parent
        others = [one for one in sys.path if Path(one or ".").resolve() not in (here, here.parent)]
        sys.path[:] = [str(Path(words[0]).resolve().parent), *others]
        runpy.run_path(words[0], run_name="__main__")
