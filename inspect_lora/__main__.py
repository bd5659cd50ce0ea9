"""Tell what a LoRA adapter is worth: what it gained, which part does the work, what it says.

    python -m inspect_lora info ADAPTER           what is in the file: in seconds, without the base
    python -m inspect_lora evidence ADAPTER       what it gained, what else changed, what it says
    python -m inspect_lora chat ADAPTER           talk to it, at any strength, beside the base
    python -m inspect_lora compare FOLDER ...     which is better, and is the difference clear?
    python -m inspect_lora export ADAPTER FOLDER  a weaker, a smaller or a renamed adapter
    python -m inspect_lora served URL ADAPTER     does a running server apply it?

ADAPTER is the folder of a LoRA adapter that PEFT saved, whoever trained it, or its name on the
Hugging Face hub. Nothing is trained, and nothing is written into the adapter's folder. A command
tells its flags with --help; it ends with status 0, 1 after an error, 2 after a wrong flag, and 3
if `evidence --fail_if` names what was found.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import textwrap
from pathlib import Path

if not __package__:  # started as `python path/to/inspect_lora`, so its own folder comes first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# What libraries read when they are imported. Threads that wait busily slowed a run beside another
# busy process from 28 s to 245 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
if sys.stderr is None or not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from inspect_lora.common import InspectError, one_line

# Each command's module is imported when it is called: `info` must not wait for transformers.
COMMANDS = ("info", "evidence", "chat", "compare", "export", "served")


def main(argv: list[str] | None = None) -> None:
    """Do one command. Exits with 1 after an error, 2 after a wrong flag, 130 after Ctrl-C."""
    words = sys.argv[1:] if argv is None else argv
    try:
        run_command(words)
        sys.stdout.flush()
    except users_mistakes() as error:
        give_up(str(error), 1)
    except ModuleNotFoundError as error:
        needed = Path(__file__).resolve().parent.parent / "requirements.txt"
        give_up(f"The package {error.name} is missing: pip install -r {needed}", 1)
    except KeyboardInterrupt:
        give_up("Stopped.", 130)
    except BrokenPipeError:  # as with `| head`: what reads the output has gone away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except RuntimeError as error:
        script = sys.modules.get("train_lora_single")  # without it nothing is on a GPU
        if script is None or not script.is_out_of_memory(error):
            raise
        give_up(
            f"The GPU's memory is full ({one_line(error)}). Stop other programs there. If there "
            "are none, --dtype bfloat16 halves what float32 needs, and --device cpu needs no GPU. "
            "evidence needs less with --max_seq_len (it leaves long held-out lines out), with a "
            "smaller --max_new_tokens for its samples, or with --examples 0 and --checks 0 (they "
            "leave measurements out).",
            1,
        )


def run_command(words: list[str]) -> None:
    """Read the command's own flags, and run it."""
    parser = argparse.ArgumentParser(
        prog="python -m inspect_lora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="python -m inspect_lora COMMAND ...",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=", ".join(COMMANDS))
    if not words:
        parser.print_help()
        raise SystemExit(2)
    name = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"inspect_lora.{name}")
    command = argparse.ArgumentParser(
        prog=f"python -m inspect_lora {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(command)
    module.run(command.parse_args([with_underscores(word) for word in words[1:]]))


def with_underscores(word: str) -> str:
    """Return a flag that was typed with hyphens, such as --eval-file, as it is called here."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def users_mistakes() -> tuple[type[Exception], ...]:
    """Return the errors that one message explains; the script has its own, if it was loaded."""
    script = sys.modules.get("train_lora_single")
    return (InspectError, script.UserError) if script else (InspectError,)


def give_up(message: str, status: int) -> None:
    """Print a message, with its long lines broken at spaces, and end with a status."""
    lines = [
        textwrap.fill(line, 100, break_long_words=False, break_on_hyphens=False)
        for line in message.split("\n")
    ]
    print("\n".join(lines), file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a queue's time limit, as Ctrl-C
    if sys.stdout is not None:  # a locale without "±", or half a character in a data file
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
