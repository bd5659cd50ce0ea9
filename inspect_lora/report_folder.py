"""The folder of a report: whose it is, and how a new report takes an earlier one's place."""

from __future__ import annotations

import argparse
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from inspect_lora.common import (
    InspectError,
    file_sha256,
    one_line,
    path_from_here,
    read_json,
    rename_old,
    report_sentence,
    shorten_path,
    write_json,
)
from inspect_lora.evidence_file import as_json_object
from inspect_lora.files import Run, path_of_adapter
from inspect_lora.findings import Findings
from inspect_lora.overview import draw_overview
from inspect_lora.page import page_of_evidence
from inspect_lora.picture import draw_picture
from inspect_lora.report import as_markdown

RECORD = "evidence.json"
PAGE = "replies.html"
FILES = (RECORD, "report.md", "overview.png", "lora.png", PAGE)


# ---- Whose it is


def folder_for_report(options: argparse.Namespace, place: Path, trained_by: Run | None) -> Path:
    """Return where the report goes: a folder of its own, and not in the adapter's.

    A report on prompts alone has one as well, since `served` and `compare` need that on replies.

    Raises InspectError if --output_dir holds another adapter's report.
    """
    suffix = "--prompts" if options.prompts else ""
    if options.output_dir:
        folder = Path(options.output_dir)
        if is_of_another(folder, options.adapter, place):
            raise InspectError(
                f"{folder} holds the report of another adapter "
                f"({adapter_of_report(folder)[0]}); give each its own --output_dir."
            )
    elif trained_by:
        folder = trained_by.path.parent / "inspected" / f"{name_in_run(place.resolve())}{suffix}"
    else:
        names = names_for(options.adapter, place)
        named = (Path("inspected") / f"{name}{suffix}" for name in names)
        folder = next(one for one in named if not is_of_another(one, options.adapter, place))
    if place.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise InspectError(
            f"The report would go into {folder}, but nothing is written into the adapter's own "
            "folder or below it; choose another one with --output_dir."
        )
    return folder


def name_in_run(place: Path) -> str:
    """Return what tells an adapter from others in its run's folder.

    A checkpoint of an earlier run there (checkpoints.DATE) has the name of one of the newest run.
    """
    is_renamed = place.parent.name.startswith("checkpoints.")
    return f"{place.parent.name}--{place.name}" if is_renamed else place.name


def names_for(adapter: str, place: Path) -> Iterator[str]:
    """Yield names for a report's folder: PARENT--NAME, and longer ones if another one has that.

    Many an adapter's folder is called checkpoint-500.
    """
    if not Path(adapter).is_dir():
        yield adapter.replace("/", "--")
    parts = [part for part in Path(path_from_here(place.resolve())).parts if part != "/"]
    for count in range(min(2, len(parts)), len(parts) + 1):
        yield "--".join(parts[-count:])
    parts = place.resolve().parts[1:]
    yield "--".join(parts)
    for number in range(2, 1000):
        yield f"{'--'.join(parts)}--{number}"


def adapter_of_report(folder: Path) -> tuple[str, str]:
    """Return path and hash of the adapter that a report is of; empty texts if there is none."""
    record = read_json(folder / RECORD) or {}
    name = str(record.get("adapter") or "")  # all that schema 1 has; it was seen from somewhere
    if name and Path(name).is_dir():
        name = str(Path(name).resolve())
    return str(record.get("adapter_path") or name), str(record.get("adapter_sha256") or "")


def is_of_another(folder: Path, adapter: str, place: Path) -> bool:
    """Return whether a folder holds the report of another adapter.

    One with the same bytes whose old path is gone was moved here.
    """
    path, sha256 = adapter_of_report(folder)
    if not path or path == path_of_adapter(adapter, place):
        return False
    return sha256 != file_sha256(place / "adapter_model.safetensors") or Path(path).exists()


# ---- How it is written


def prepare_folder(folder: Path) -> None:
    """Make the folder and write into it, before anything is measured."""
    with errors_as_messages(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))


@contextmanager
def errors_as_messages(folder: Path) -> Iterator[None]:
    """Say in one message that a folder cannot be written, as when the disk is full."""
    try:
        yield
    except OSError as error:
        raise InspectError(
            f"Nothing can be written into {folder} ({one_line(error)}). Free space there, or "
            "choose another folder with --output_dir. An earlier report there is as it was."
        ) from error


def write_report(found: Findings, folder: Path) -> None:
    """Write a whole report beside its place; then it takes the place of an earlier one.

    What is renamed then is never half a report: Ctrl-C has to wait for it.
    """
    with errors_as_messages(folder), tempfile.TemporaryDirectory(prefix=".", dir=folder) as beside:
        new = Path(beside)
        record = as_json_object(found)
        write_json(new / RECORD, record)
        draw_overview(record, new / "overview.png")
        draw_picture(found, new / "lora.png")
        pictures = {path.name for path in new.glob("*.png")}
        text = as_markdown(found, pictures).encode(errors="backslashreplace")
        (new / "report.md").write_bytes(text)  # a kind may hold half a character
        names = (shorten_path(name, 60) for name in (found.name, found.adapter.base))
        if page := page_of_evidence(*names, record["replies"]):
            (new / PAGE).write_text(page, encoding="utf-8")
        with no_interruption():
            for name in FILES:
                rename_old(folder / name)
            for path in new.iterdir():
                path.rename(folder / path.name)
            found.is_written = True  # before a signal that had to wait ends the command


def keep_unfinished(found: Findings, folder: Path) -> None:
    """Write what was found before the command was stopped; a finished report is left as it is."""
    earlier = read_json(folder / RECORD) or {}
    path = folder / (f"{RECORD}.unfinished" if earlier.get("finished") else RECORD)
    with errors_as_messages(folder):
        write_json(path, as_json_object(found))
    report_sentence("stopped", f"what was found so far is in {path_from_here(path)}")


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, a queue, a closed terminal


@contextmanager
def no_interruption() -> Iterator[None]:
    """Let signals wait for a moment; each then does what it would have done, and ends the command.

    A mask of signals would not do: it is of one thread, torch starts others, and what comes to one
    of them is handled in the main thread at once. Handlers are for the main thread alone; another
    thread is not interrupted by signals, and nothing has to wait there.
    """
    came: list[int] = []
    handlers = {}

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)

    is_main = threading.current_thread() is threading.main_thread()
    try:
        for number in SIGNALS if is_main else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not set by Python
                handlers[number] = signal.signal(number, remember)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)
