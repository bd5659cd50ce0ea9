"""Tell what a LoRA adapter is worth: what it gained, which part does the work, what it says.

    python -m inspect_lora info ADAPTER           what is in the file: at once, without the base
    python -m inspect_lora evidence ADAPTER       what it gained, what else changed, what it says
    python -m inspect_lora report FOLDER          the tables and the pages again, without a GPU
    python -m inspect_lora compare FOLDER ...     adapters side by side on the same lines
    python -m inspect_lora chat ADAPTER           talk to it, at any strength, beside the base
    python -m inspect_lora export ADAPTER FOLDER  a weaker, a smaller or a renamed adapter
    python -m inspect_lora served FOLDER          does a running server apply it?

ADAPTER is the folder of a LoRA that PEFT saved, whoever trained it, or its name on the Hugging Face
hub; FOLDER is that of a report. Nothing is trained, and nothing is written into the adapter's
folder. `COMMAND --help` tells the flags of a command.
"""

import argparse
import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else 28 s become 245 beside a busy process
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from inspect_lora.common import InspectError

COMMANDS = ("info", "evidence", "report", "compare", "chat", "export", "served")


def main(argv: list[str] | None = None) -> None:
    """Do one command. Exits with 1 after an error, 2 after a wrong flag, 130 after Ctrl-C."""
    try:
        run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except users_mistakes() as error:
        print(error, file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # as with `| head`: what reads the output has gone away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def run_command(words: list[str]) -> None:
    """Read the command's own flags, and run it."""
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    parser = argparse.ArgumentParser("python -m inspect_lora", description=__doc__, **how)
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(words[:1]).command
    if name == "info":  # its matrices are small: threads that wait for each other double its time
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    module = importlib.import_module(f"inspect_lora.{name}")  # `info` must not wait for torch
    parser = argparse.ArgumentParser(f"{parser.prog} {name}", description=module.__doc__, **how)
    module.add_arguments(parser)
    module.run(parser.parse_args(words[1:]))


def users_mistakes() -> tuple[type[Exception], ...]:
    """Return the errors that one message explains; the script has its own, if it was loaded."""
    script = sys.modules.get("train_lora_single")
    return (InspectError, script.UserError) if script else (InspectError,)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # half a character in a reply or in data
    main()
