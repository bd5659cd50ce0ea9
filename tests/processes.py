"""Commands in forks of the tests' own process, which has done the imports of seven seconds."""

import fcntl
import logging
import os
import pty
import runpy
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import traceback
import warnings
from pathlib import Path

OUR_OWN = {"train_lora_single", "inspect_lora", "conftest", "trainers", "processes", "by_hand"}
REAL_RUN = subprocess.run


class Fork:
    """A child of this process that does something, and its end."""

    def __init__(self, be):
        """Begin be() in a child; what it returns, or exits with, becomes its status."""
        sys.stdout.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of pytest-xdist's own thread
            self.pid = os.fork()
        self.exitcode = None
        if self.pid == 0:
            os._exit(status_of(be))

    def join(self, seconds):
        """Wait for it, so long at the most."""
        end = time.monotonic() + seconds
        while self.exitcode is None and time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.exitcode = os.waitstatus_to_exitcode(status)
            else:
                time.sleep(0.005)

    def kill(self):
        """End it as kill -9 does."""
        os.kill(self.pid, signal.SIGKILL)

    def end(self, seconds=120):
        """Wait for it, and return its exit status; the signal's number below 0 if one ended it."""
        self.join(seconds)
        hangs = self.exitcode is None
        if hangs:
            self.kill()
            self.join(10)
        assert not hangs
        return self.exitcode


def status_of(be):
    """Do be() in this child, and return its exit status as Python would."""
    status = 1
    try:
        os.setsid()  # a terminal's signals are not for it
        logging.root.handlers.clear()  # whose files are the parent's
        status = be()
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # its reader is gone
            continue
    return status or 0


def write_to(*paths):
    """Let standard output and error of this child go to files: to one, or to one each."""
    for number, path in ((1, paths[0]), (2, paths[-1])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    fresh_streams()


def fresh_streams():
    """Give this child streams of its own on its standard files, as a new process has them."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - until the process ends
    sys.stdout, sys.stderr = (
        open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        for number in (1, 2)
    )


def run_in_a_fork(words, *, cwd, env=None, input="", first="", **others):
    """Do what subprocess.run() does, for `python FILE ...`, a folder, and `python -m MODULE ...`.

    The code in first is run before that. Any other command is given to subprocess.run().

    A command with a PYTHONPATH of its own is given to it, too: what is installed there must be
    seen while the packages are imported.
    """
    environment = dict(os.environ if env is None else env)
    is_plain = environment.get("PYTHONPATH", "") == os.environ.get("PYTHONPATH", "")
    is_known = words[1] == "-m" or words[1].endswith(".py") or Path(cwd, words[1]).is_dir()
    if words[0] != sys.executable or not is_known or not is_plain:
        return REAL_RUN(words, cwd=cwd, env=env, input=input, **others)
    with tempfile.TemporaryDirectory() as folder:
        said, printed, errors = (Path(folder) / name for name in ("said", "printed", "errors"))
        said.write_text(input, encoding="utf-8")
        errors.touch()
        if others.get("stderr") == subprocess.STDOUT:
            errors = printed

        def be_the_command():
            os.environ.clear()
            os.environ.update(environment)
            os.dup2(os.open(said, os.O_RDONLY), 0)
            write_to(printed, errors)
            exec(first, {})
            be_python(words[1:], cwd)

        process = Fork(be_the_command)
        process.end(300)
        text, complaints = (one.read_text(encoding="utf-8") for one in (printed, errors))
    return subprocess.CompletedProcess(
        words, process.exitcode, text, "" if errors == printed else complaints
    )


def begin_on_a_terminal(words, cwd):
    """Begin `python FILE ...` in a fork, on a terminal of 100 columns; return it and our end."""
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    name = os.ttyname(its)
    reader, writer = os.pipe()

    def be_on_a_terminal():
        os.close(own)
        terminal = os.open(name, os.O_RDWR)  # the first terminal of a session controls it
        for number in range(3):
            os.dup2(terminal, number)
        os.close(terminal)
        os.close(its)
        fresh_streams()
        os.write(writer, b"ready")
        be_python(words[1:], cwd)

    process = Fork(be_on_a_terminal)
    os.close(writer)
    assert os.read(reader, 5) == b"ready"
    os.close(reader)
    os.close(its)  # so that reading from our end ends with the process
    return process, own


def be_python(words, cwd="."):
    """Do what `python WORDS` does in a folder, as if nothing of ours had been imported yet."""
    os.chdir(cwd)
    for name in [name for name in sys.modules if name.partition(".")[0] in OUR_OWN]:
        del sys.modules[name]
    here = Path(__file__).resolve().parent
    # The file's own folder comes first, and those of the tests are not on its path.
    others = [one for one in sys.path if Path(one or ".").resolve() not in (here, here.parent)]
    if words[0] == "-m":
        sys.argv, sys.path[:] = words[1:], [os.getcwd(), *others]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        folder = Path(words[0]).resolve()
        sys.path[:] = [str(folder.parent if folder.is_file() else folder), *others]
        runpy.run_path(words[0], run_name="__main__")
