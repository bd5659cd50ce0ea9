"""Tell what a LoRA adapter is worth: what it gained, which part does the work, what it says.

    inspect-lora info ADAPTER           what is in the file: at once, without the base
    inspect-lora evidence ADAPTER ...   what it gained, what else changed, what it says
    inspect-lora report FOLDER          the tables and the pages again, without a GPU
    inspect-lora compare FOLDER ...     adapters side by side on the same lines
    inspect-lora losses FOLDER ...      a picture of trainings, also while they run
    inspect-lora chat ADAPTER           talk to it, at any strength, beside the base
    inspect-lora export ADAPTER FOLDER  a weaker, a smaller, a renamed or a merged copy
    inspect-lora served FOLDER          does a running server apply it?

ADAPTER is the folder of a LoRA that PEFT saved, whoever trained it, or its name on the Hugging Face
hub; FOLDER is that of a report. Nothing is trained, and nothing is written into the adapter's
folder. `COMMAND --help` tells the flags of a command.

The status is 0 if all is well, 1 if what was asked about is not so, 2 if it could not be done, and
128 + n after signal n. Results are written to stdout; progress, warnings and errors to stderr.
"""

import argparse
import importlib
import inspect
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else 28 s become 245 beside a busy process
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from inspect_lora.common import InspectError, at_least, program

# The flags of all commands stand in this file, and their code is imported when one is called: so
# every --help, and what needs no model, works without torch.
Parser = argparse.ArgumentParser
REPORT_SCHEMA = 1  # of --json
GENERAL_FILE = str(Path(__file__).with_name("general.jsonl"))


def main(argv: list[str] | None = None) -> None:
    """Do one command, and exit with its status."""
    try:
        status = run_command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except users_mistakes() as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    except ModuleNotFoundError as error:
        print(
            f"{error}: pip install 'inspect-lora[measure]', or, beside the project's files, "
            "pip install -r requirements.txt",
            file=sys.stderr,
        )
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        print("Stopped.", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:  # as with `| head`: what reads the output has gone away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    if status:
        raise SystemExit(status)


def run_command(words: list[str]) -> int:
    """Read the command's own flags, run it, and return its status."""
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    about = __doc__.replace("inspect-lora", program())
    parser = Parser(program(), description=about, **layout)
    parser.add_argument("command", choices=COMMANDS)
    name = parser.parse_args(words[:1]).command
    add_flags, run = COMMANDS[name]
    parser = Parser(f"{program()} {name}", description=inspect.getdoc(add_flags), **layout)
    add_flags(parser)
    return run(parser.parse_args(words[1:])) or 0


def users_mistakes() -> tuple[type[Exception], ...]:
    """Return the errors that one message explains; the script has its own, if it was loaded."""
    script = sys.modules.get("train_lora_single")
    return (InspectError, script.UserError) if script else (InspectError,)


# ---- Flags


def info_flags(parser: Parser) -> None:
    """Say what adapters are, from their own files, whatever trainer made them.

    The status is 1 if something makes the adapter useless or wrong, such as NaN. With --for vllm it
    is 1, too, where vLLM ignores or refuses the adapter, and 2 where that is not known. Of several
    adapters it is the highest; --json prints an object for each.
    """
    add_adapters(parser)
    parser.add_argument("--base", help="the base, if it is not what the adapter names")
    parser.add_argument("--for", dest="server", choices=("vllm",), help="what will serve it")
    add_json(parser)


def add_adapters(parser: Parser) -> None:
    """Add the adapters of the commands that take several."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="folders, or names on the hub"
    )


def add_json(parser: Parser) -> None:
    """Add the flag of the commands whose results a program may read."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def weights_flags(parser: Parser) -> None:
    """Add the flags of the commands that load the base."""
    parser.add_argument("--base", help="the base model, if it is not what the adapter names")
    parser.add_argument("--base_revision", help="its branch, tag or commit on the hub")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the training's")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--chat_template", metavar="FILE", help="default: the adapter's, or base's")
    parser.add_argument("--enable_thinking", action="store_true", help="if it was trained to think")


def model_flags(parser: Parser) -> None:
    """Add the flags of the commands that talk to the adapter."""
    weights_flags(parser)
    parser.add_argument("--system", help="system message; default: that of the training")


def evidence_flags(parser: Parser) -> None:
    """Measure adapters: what they gained on held-out lines, what else changed, what they say.

    What is counted goes into evidence.json after each measurement. report.md, the picture and
    replies.html are made from that file, also where Ctrl-C, SIGTERM or SIGUSR1 stopped it, and are
    made again by `report FOLDER`. The folder is inspected/NAME beside the adapter, or --output_dir;
    an earlier report there is renamed. What is finished with the same files and flags is not
    measured again. Several adapters share one base in memory, and are compared at the end.

    An adapter of train_lora_single.py brings its held-out file and what it learned. For another
    one, --eval_file names conversations that it was not trained on, and --train_file what it
    learned. A held-out line may have a "rejected" reply beside its own, or be prompt, chosen,
    rejected: then both replies' likelihoods are measured. With --prompts, prompts without replies
    are asked instead: what base and adapter say, and what changed on other tasks, but no losses.

    Of a held-out conversation the last reply's prompt is asked: those with a rule that asks for
    something ("any"), and a draw of the others, up to 100 in all on a CPU and 200 on a GPU. With
    --replies N it is N in all.
    """
    add_adapters(parser)
    model_flags(parser)
    add, whole, positive = parser.add_argument, at_least(0), at_least(1)
    of_lines = parser.add_mutually_exclusive_group().add_argument
    of_lines("--eval_file", help="held-out conversations; default: those of the training")
    of_lines("--prompts", metavar="FILE", help="prompts without replies")
    add("--train_file", help="what another trainer taught it; such lines are left out")
    add("--rules", metavar="FILE", help="rules that replies must pass")
    add("--general_file", default=GENERAL_FILE, help='other tasks; "" for none')
    add("--kind", default="kind", help="the key that groups lines in the table; default: kind")
    add("--cluster", metavar="KEY", help="lines with the same value of this key count as one")
    add("--parts", type=whole, default=40, help="held-out replies to measure parts on; default: 40")
    add("--tasks", type=whole, default=50, help="other tasks to measure on; default: 50")
    add("--replies", type=whole, help="held-out conversations to answer; default: 100, or 200")
    add("--max_new_tokens", type=positive, default=200, help="where a reply is cut; default: 200")
    add("--max_seq_len", type=positive, help="leave longer lines out; default: as in the training")
    add("--output_dir", help="where the report goes; default: inspected/NAME beside the adapter")
    add("--again", action="store_true", help="measure also what is finished")


def report_flags(parser: Parser) -> None:
    """Make what is shown from a record again: tables, report.md, the picture and replies.html."""
    parser.add_argument("folder", metavar="FOLDER", help="a report's folder: evidence.json is read")
    add_json(parser)


def compare_flags(parser: Parser) -> None:
    """Compare adapters of one base that `evidence` has measured, the lowest held-out loss first.

    Every evidence.json in the folders and below is read; the newest report of an adapter counts.
    Losses are compared on the held-out replies that all adapters share, checks on the prompts that
    all share with the same rule. Runs that differ in their seed alone are one row, and then the
    seeds are the unit. The intervals against the best row have joint 95 % coverage over all pairs
    (Bonferroni), since it was picked as the best. replies.html shows the replies of all, side by
    side, or those of a chosen pair blind.
    """
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="such as output")
    parser.add_argument("--output_dir", default="compared", help="where replies.html goes")
    add_json(parser)


def losses_flags(parser: Parser) -> None:
    """Draw the losses of one or several runs of the training script, also while they train."""
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="the OUTPUT_DIR of a run")
    parser.add_argument("--output", default="losses.png", help="the picture; default: losses.png")


def chat_flags(parser: Parser) -> None:
    """Talk to an adapter, at any strength, beside its base; nothing is written.

    Replies are greedy, always the likeliest token. A pipe works, too: each of its lines is
    answered.
    """
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    model_flags(parser)
    parser.add_argument("--max_new_tokens", type=at_least(1), default=200, help="default: 200")


def export_flags(parser: Parser) -> None:
    """Write a weaker, a smaller or a renamed copy of an adapter, or merge it into its base.

    --scale multiplies every update, by lora_alpha alone: the tensors stay as they are. --rank keeps
    the strongest directions of every update. --vllm writes the names of a model for images and
    text, such as Qwen3.5: vLLM up to 0.32 accepts those of its text model, and ignores them without
    a word. These three need the adapter's files alone, and --vllm the base's config.json.

    --merge writes the base with the adapter in it, the tokenizer and its chat template beside, and
    verifies it: read again, its logits must be those of the adapter on its base.
    """
    parser.add_argument("adapter", metavar="ADAPTER", help="a folder, or a name on the hub")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder to write into")
    parser.add_argument("--scale", type=float, default=1.0, help="of every update, such as 0.75")
    parser.add_argument("--rank", type=at_least(1), help="directions to keep of every update")
    parser.add_argument("--vllm", action="store_true", help="write the names that vLLM applies")
    parser.add_argument("--merge", action="store_true", help="write one model, for llama.cpp")
    weights_flags(parser)


def served_flags(parser: Parser) -> None:
    """Ask a running server whether it applies an adapter.

    A server can accept an adapter and silently ignore it. So it is asked to score the replies in a
    report's record, under the adapter's name and under its base's; what the adapter changes there
    is compared with what it changed here. The server is also asked whether it renders prompts as
    they were measured. vLLM answers both; an API key is read from VLLM_API_KEY or OPENAI_API_KEY.

    The status is 1 if it is not applied, if that cannot be told, or if prompts are rendered
    differently.
    """
    parser.add_argument("folder", metavar="FOLDER", help="the report on the adapter")
    parser.add_argument("--url", default="http://localhost:8000", help="default: %(default)s")
    parser.add_argument("--name", help="what the server calls the adapter, if it has several")
    add_json(parser)


# ---- What each command does, imported when it is called; returns its status


def run_report(options: argparse.Namespace) -> None:
    """Print a report, and write its files anew."""
    from inspect_lora import report
    from inspect_lora.record import read_record

    record = read_record(Path(options.folder))
    if options.json:
        print(json.dumps({"schema": REPORT_SCHEMA} | report.estimates(record), indent=1))
    else:
        report.show_all(record, is_old=True)


def run_compare(options: argparse.Namespace) -> None:
    """Compare adapters."""
    from inspect_lora.compare import compare

    compare(options.folders, Path(options.output_dir), options.json)


def run_losses(options: argparse.Namespace) -> None:
    """Draw losses."""
    from inspect_lora.picture import draw_losses

    draw_losses(options.folders, Path(options.output))
    print(options.output)


def run_module(name: str) -> Callable[[argparse.Namespace], int | None]:
    """Return what imports the module of a command, and runs it."""
    return lambda options: importlib.import_module(f"inspect_lora.{name}").run(options)


COMMANDS: dict[str, tuple[Callable[[Parser], None], Callable[[argparse.Namespace], int | None]]] = {
    "info": (info_flags, run_module("info")),
    "evidence": (evidence_flags, run_module("evidence")),
    "report": (report_flags, run_report),
    "compare": (compare_flags, run_compare),
    "losses": (losses_flags, run_losses),
    "chat": (chat_flags, run_module("chat")),
    "export": (export_flags, run_module("export")),
    "served": (served_flags, run_module("served")),
}


def command_line() -> None:
    """Do the command of the command line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # half a character in a reply or in data
    main()


if __name__ == "__main__":
    command_line()
