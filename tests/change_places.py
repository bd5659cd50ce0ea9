"""Change single places of the script and the package, and say whether the tests see it.

    python tests/change_places.py list              # the places drawn, and what each becomes
    python tests/change_places.py record FOLDER     # once: which tests execute which line
    python tests/change_places.py run FOLDER        # change one place after the other, and test
    python tests/change_places.py whole FOLDER      # what was not seen, with the whole suite

A place is a comparison (negated, or its limit moved: < to <=), a number (one more), and/or, True
or False, or a `not` (dropped). Those inside f-strings are left out, since Python 3.11 does not say
where they stand. The places are drawn by SEED from the files as they are now.

Each change is made in a copy of the repository in FOLDER. The tests that execute its statement run
there, the shortest first, until one fails. That test must pass without the change. A constant's
tests are those that execute a statement with its name. Where no test is known, the file's own tests
run (test_info.py for info.py), or else all. `record` needs `pip install coverage`. It follows
commands in forks, but no command in a process of its own and none that is killed; `whole` makes up
for that.

The verdicts are appended to FOLDER/results.jsonl: seen, not seen, time limit (no test had failed by
then), or no test. A change that has one is not tried again by `run`, unless `--only` names it.
"""

import argparse
import ast
import difflib
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # accelerate requires it
import pytest
from processes import Fork, write_to

SEED = 49
NUMBER = 60
SECONDS = 300  # for all tests of one place
BYTES = 12 * 2**30  # of memory for each process: a change may let a list grow without end
ROOT = Path(__file__).resolve().parent.parent
FILES = ["train_lora_single.py", "inspect_lora/*.py"]
NEGATED = {"<": ">=", ">": "<=", "==": "!=", "is": "is not", "in": "not in", "and": "or"}
NEGATED |= {new: old for old, new in NEGATED.items()}
LIMIT_MOVED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
OPERATOR = re.compile(rb"\b(?:is\s+not|not\s+in|is|in|and|or)\b|[<>=!]=|[<>]")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Place(NamedTuple):
    """Bytes start to end of a file, what they may become, and the statements around them."""

    file: str
    start: int
    end: int
    news: tuple[str, ...]
    line: int
    trail: tuple[ast.stmt, ...]


def code_files(root: Path) -> dict[str, bytes]:
    """Return the script's and the package's files by their names below root."""
    paths = sorted(path for pattern in FILES for path in root.glob(pattern))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def walk(node: ast.AST, trail: tuple[ast.stmt, ...] = ()) -> Iterator[tuple[ast.AST, tuple]]:
    """Yield each node with the statements around it, the outermost first; no f-strings."""
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.stmt):
        trail = (*trail, node)
    yield node, trail
    for child in ast.iter_child_nodes(node):
        yield from walk(child, trail)


def places(file: str, source: bytes) -> list[Place]:
    """Return all single places of a file that can be changed, in their order."""
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    found = []

    def add(start: int, end: int, news: tuple[str, ...], trail: tuple) -> None:
        line = source[:start].count(b"\n") + 1
        found.append(Place(file, start, end, news, line, trail))

    for node, trail in walk(ast.parse(source)):
        operands = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        if isinstance(node, ast.BoolOp):
            operands = node.values
        for left, right in itertools.pairwise(operands):
            start = starts[left.end_lineno - 1] + left.end_col_offset
            gap = source[start : starts[right.lineno - 1] + right.col_offset]
            gap = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), gap)
            operator = OPERATOR.search(gap)
            word = " ".join(operator[0].decode().split())
            news = [table[word] for table in (NEGATED, LIMIT_MOVED) if word in table]
            add(start + operator.start(), start + operator.end(), tuple(news), trail)
        if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
            new = not node.value if isinstance(node.value, bool) else node.value + 1
            start = starts[node.lineno - 1] + node.col_offset
            if new != node.value:  # as 1e30 + 1 is not
                end = starts[node.end_lineno - 1] + node.end_col_offset
                add(start, end, (repr(new),), trail)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start = starts[node.lineno - 1] + node.col_offset
            add(start, start + re.match(rb"not\s*", source[start:]).end(), ("",), trail)
    return sorted(found, key=lambda place: (place.start, place.end))


def changed(source: bytes, place: Place, new: str) -> bytes:
    """Return the file's text with the change; it is valid, and means something else."""
    text = source[: place.start] + new.encode() + source[place.end :]
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(source)), (place.file, place.line)
    return text


def drawn(sources: dict[str, bytes], number: int = NUMBER) -> list[tuple[Place, str]]:
    """Return the places drawn by SEED from these files, each with what it becomes."""
    every = [place for file, source in sources.items() for place in places(file, source)]
    draw = random.Random(SEED)
    return [(place, draw.choice(place.news)) for place in draw.sample(every, number)]


def in_words(place: Place, new: str, source: bytes) -> dict[str, Any]:
    """Return what is printed and kept of a change."""
    return {
        "file": place.file,
        "line": place.line,
        "text": source.splitlines()[place.line - 1].decode().strip(),
        "old": source[place.start : place.end].decode().strip(),
        "new": new,
    }


# ---- which tests execute it ----------------------------------------------------------------------


class Recorder:
    """A plugin that tells coverage which test runs, and keeps each test's seconds.

    What a fixture of a file or of the session does counts for every test that asks for it.
    """

    def __init__(self, cover: Any) -> None:
        """Take a coverage.Coverage that has started."""
        self.cover, self.contexts = cover, []
        self.seconds, self.fixtures, self.failed = defaultdict(float), {}, set()

    def within(self, context: str) -> Iterator[None]:
        """Let lines count for this context, and then for the former one."""
        self.contexts.append(context)
        self.cover.switch_context(context)
        try:
            return (yield)
        finally:
            self.contexts.pop()
            self.cover.switch_context(self.contexts[-1] if self.contexts else "")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        """Let lines count for a test."""
        self.fixtures[item.nodeid] = list(item.fixturenames)
        return (yield from self.within(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        """Let lines count for a fixture that several tests share."""
        if fixturedef.scope == "function":
            return (yield)
        return (yield from self.within(f"fixture {fixturedef.argname}"))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Keep a test's seconds, and whether it failed."""
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self.failed.add(report.nodeid)


def record_here(out: str, files: list[str]) -> None:
    """Run the suite (or files of it) in this process, and write who executes what to a file."""
    coverage = importlib.import_module("coverage")
    folder = Path(out).parent
    include = [f"*/{pattern}" for pattern in FILES]
    data_file = str(folder / "lines")
    cover = coverage.Coverage(
        data_file=data_file, data_suffix=True, include=include, config_file=False
    )
    cover.start()
    leave = os._exit

    def save_and_leave(status: int) -> None:
        cover.stop()
        cover.save()
        leave(status)

    os._exit = save_and_leave  # the end of each fork
    recorder = Recorder(cover)
    pytest.main(["-n", "0", "-p", "no:cacheprovider", *files], plugins=[recorder])
    cover.stop()
    cover.save()
    whole = coverage.Coverage(data_file=data_file, config_file=False)
    whole.combine()
    users = defaultdict(set)
    for test, fixtures in recorder.fixtures.items():
        users[test].add(test)
        for fixture in fixtures:
            users[f"fixture {fixture}"].add(test)
    sources = code_files(Path.cwd())
    executed: dict[str, Any] = {file: defaultdict(set) for file in sources}
    data = whole.get_data()
    for path in data.measured_files():
        for file in sources:
            if not path.endswith(f"/{file}"):
                continue
            for line, contexts in data.contexts_by_lineno(path).items():
                executed[file][line] |= set().union(*(users[one] for one in contexts))
    numbers = {test: number for number, test in enumerate(recorder.fixtures)}
    record = {
        "seconds": {test: round(recorder.seconds[test], 2) for test in numbers},
        "failed": sorted(recorder.failed),
        "sources": {file: text.decode() for file, text in sources.items()},
        "executed": {
            file: {line: sorted(numbers[test] for test in tests) for line, tests in lines.items()}
            for file, lines in executed.items()
        },
    }
    Path(out).write_text(json.dumps(record), encoding="utf-8")


def own_lines(place: Place) -> range:
    """Return the lines of the place's own statement, without the statements inside it."""
    statement = place.trail[-1]
    inside = getattr(statement, "body", None)
    end = max(statement.lineno, inside[0].lineno - 1) if inside else statement.end_lineno
    return range(min(statement.lineno, place.line), max(end, place.line) + 1)


def lines_of(place: Place, sources: dict[str, bytes]) -> set[tuple[str, int]]:
    """Return the lines (file, number) at which a change of this place can be seen.

    What is outside of all functions, or a default of one, is executed by the import: then these are
    also the lines with the names that it defines.
    """
    lines = {(place.file, line) for line in own_lines(place)}
    if any(isinstance(around, FUNCTIONS) for around in place.trail[:-1]):
        return lines
    statement = place.trail[-1]
    if isinstance(statement, FUNCTIONS):
        return lines | {
            (place.file, line) for line in range(statement.lineno + 1, statement.end_lineno + 1)
        }
    top = place.trail[0]
    targets = getattr(top, "targets", [getattr(top, "target", None)])
    inside = [node for target in targets if target for node in ast.walk(target)]
    names = {node.id for node in inside if isinstance(node, ast.Name)}
    names.add(getattr(top, "name", ""))
    for file, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            name = isinstance(node, ast.Name) and node.id
            attribute = isinstance(node, ast.Attribute) and node.attr
            if name in names or attribute in names:
                lines.add((file, node.lineno))
    return lines


def former_lines(old: str, new: str) -> dict[int, int]:
    """Return the line in the recorded text for each line of the present one that has its like."""
    matcher = difflib.SequenceMatcher(None, old.splitlines(), new.splitlines(), autojunk=False)
    former = {}
    for _, i1, i2, j1, j2 in matcher.get_opcodes():
        if i2 - i1 == j2 - j1:  # equal, or as many lines in its place
            former |= {j + 1: i + 1 for i, j in zip(range(i1, i2), range(j1, j2), strict=True)}
    return former


class Record:
    """Who executes what, in the files as they are now."""

    def __init__(self, path: Path, sources: dict[str, bytes]) -> None:
        """Read what record_here() wrote."""
        record = json.loads(path.read_text(encoding="utf-8"))
        self.sources = sources
        self.seconds = record["seconds"]
        self.names = list(self.seconds)
        self.failed = set(record["failed"])
        self.executed = record["executed"]
        self.former = {
            file: former_lines(record["sources"].get(file, ""), source.decode())
            for file, source in sources.items()
        }

    def tests_of(self, place: Place) -> list[str]:
        """Return the tests that execute a place, the shortest first, in groups of one file."""
        tests = set()
        for file, line in lines_of(place, self.sources):
            former = str(self.former[file].get(line))
            tests |= {self.names[one] for one in self.executed.get(file, {}).get(former, [])}
        own = f"tests/test_{Path(place.file).stem}.py::"
        tests = tests or {test for test in self.names if test.startswith(own)} or set(self.names)

        def by_time(test: str) -> tuple[int, str, float]:
            # Fixtures of a file are made anew when another file's test came between: few groups.
            seconds = self.seconds[test]
            return math.ceil(math.log(seconds + 1, 4)), test.partition("::")[0], seconds

        return sorted(tests - self.failed, key=by_time)


# ---- the tests of one change ---------------------------------------------------------------------


class Chosen:
    """A plugin that runs the chosen tests in their order, and writes what begins and what fails."""

    def __init__(self, tests: list[str], without: list[str], log: Path) -> None:
        """Take the tests' names (none for all that are found), and those that are left out."""
        self.order = {test: number for number, test in enumerate(tests)}
        self.without, self.log = without, log

    def write(self, word: str, test: str, message: str = "") -> None:
        """Write a line at once: this process may be killed."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(json.dumps([word, test, message]) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list) -> None:
        """Keep the chosen tests, in their order."""
        items[:] = [item for item in items if item.nodeid not in self.without]
        if self.order:
            items[:] = [item for item in items if item.nodeid in self.order]
            items.sort(key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Write that a test begins."""
        self.write("begin", nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Write that a test fails, and how."""
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.write("fail", report.nodeid, crash.message[:300] if crash else "")

    def pytest_collectreport(self, report: Any) -> None:
        """Write that a file of tests cannot be imported."""
        if report.failed:
            self.write("fail", report.nodeid, str(report.longrepr)[-300:])


def imported_once() -> None:
    """Import what takes seconds, for all forks, as conftest.py would: offline, with one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # a former change's code must not be taken for this one's
    for name in ("torch", "transformers", "peft", "trl"):
        importlib.import_module(name)


def end_all(process: Fork) -> None:
    """Kill a process and all that it began: forks of the tests have sessions of their own."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for child in children:
        if child.is_running():
            child.kill()
    process.join(10)


class End(NamedTuple):
    """How the tests of one change ended: with which test, and its message."""

    verdict: str
    test: str
    message: str


class Tests(NamedTuple):
    """Files of tests, the chosen tests in their order (none: all), and those that are left out."""

    files: list[str]
    tests: list[str]
    without: list[str]


def run_tests(folder: Path, tests: Tests, seconds: float) -> End:
    """Run these tests in the copy until one fails, or for so many seconds."""
    log, temp = folder / "log.jsonl", folder / "temp"
    log.write_text("", encoding="utf-8")
    words = ["-x", "-n", "0", "-p", "no:cacheprovider", "--basetemp", str(temp), *tests.files]

    def be_pytest() -> int:
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, resource.RLIM_INFINITY))
        write_to(folder / "printed.txt")
        os.chdir(folder / "copy")
        sys.path[0] = str(folder / "copy" / "tests")
        del sys.modules["processes"]  # the tests import the copy's
        return int(pytest.main(words, plugins=[Chosen(tests.tests, tests.without, log)]))

    process = Fork(be_pytest)
    try:
        process.join(seconds)
    finally:
        if process.exitcode is None:
            end_all(process)
            process.exitcode = None
    verdict = {None: "time limit", 0: "not seen", 5: "no test"}.get(process.exitcode, "seen")
    shutil.rmtree(temp, ignore_errors=True)
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    failed = [line[1:] for line in lines if line[0] == "fail"]
    if verdict == "seen":
        return End(verdict, *(failed or [["", "the tests cannot be imported"]])[0])
    last = lines[-1][1] if verdict == "time limit" and lines else ""
    return End(verdict, last, "")


def judged(folder: Path, tests: Tests, seconds: float, change: tuple[Path, bytes]) -> End:
    """Return how the tests of a change (a file's path and new text) end.

    A test that fails without the change, too, is left out.
    """
    path, text = change
    source = path.read_bytes()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.write_bytes(text)
        try:
            result = run_tests(folder, tests, end - time.monotonic())
        finally:
            path.write_bytes(source)
        if result.verdict != "seen" or "::" not in result.test:
            return result
        alone = Tests([result.test.partition("::")[0]], [result.test], [])
        if run_tests(folder, alone, seconds).verdict != "seen":
            return result
        tests = tests._replace(without=[*tests.without, result.test])
    return End("time limit", tests.without[-1], "fails without the change, too")


# ---- the commands --------------------------------------------------------------------------------


def copy_tree(folder: Path) -> Path:
    """Copy the repository's files, as they are now, to FOLDER/copy."""
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


def record(folder: Path, files: list[str]) -> None:
    """Run the suite (or files of it) once in a copy, and keep which tests execute which line."""
    copy = copy_tree(folder)
    for path in folder.glob("lines*"):
        path.unlink()
    out = folder / "record.json"
    words = [sys.executable, "tests/change_places.py", "record_here", str(out), *files]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run(words, cwd=copy, env=environment, check=True)
    kept = json.loads(out.read_text(encoding="utf-8"))
    print(f"{len(kept['seconds'])} tests in {sum(kept['seconds'].values()):.0f} s")
    print("Failed, and are left out:", kept["failed"])


def results_of(folder: Path, files: str) -> list[dict[str, Any]]:
    """Return the verdicts so far, the last one of each change of these very files."""
    path = folder / "results.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return list({line["place"]: line for line in lines if line["files"] == files}.values())


def digest(sources: dict[str, bytes]) -> str:
    """Return a short name of these files' contents."""
    return hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:12]


def run(folder: Path, args: argparse.Namespace) -> None:
    """Change the drawn places one at a time, and append each verdict."""
    copy = copy_tree(folder)
    sources = code_files(copy)
    files = digest(sources)
    is_whole = args.command == "whole"
    known = None if args.tests else Record(folder / "record.json", sources)
    imported_once()
    verdicts = {one["place"]: one["verdict"] for one in results_of(folder, files)}
    for number, (place, new) in enumerate(drawn(sources), 1):
        verdict = verdicts.get(number, "none")
        is_left = verdict != "seen" if is_whole else verdict == "none"
        if not (number in args.only if args.only else is_left):
            continue
        tests = Tests(args.tests or ["tests"], [], sorted(known.failed) if known else [])
        if known and not is_whole:
            chosen = known.tests_of(place)
            in_files = sorted({test.partition("::")[0] for test in chosen})
            tests = Tests([one for one in in_files if (copy / one).exists()], chosen, [])
        source = sources[place.file]
        began = time.monotonic()
        text = changed(source, place, new)
        end = judged(folder, tests, args.seconds, (copy / place.file, text))
        line = {"files": files, "place": number, **in_words(place, new, source), **end._asdict()}
        line["tests"] = len(tests.tests) or tests.files
        line["seconds"] = round(time.monotonic() - began)
        with (folder / "results.jsonl").open("a", encoding="utf-8") as results:
            results.write(json.dumps(line) + "\n")
        print(told(line), flush=True)
    lines = results_of(folder, files)
    seen = sum(one["verdict"] == "seen" for one in lines)
    print(f"Seen: {seen} of {len(lines)} that were tried, of {NUMBER} drawn.")


def told(line: dict[str, Any]) -> str:
    """Return a change and its verdict as printed."""
    text = f"{line['place']:2} {line['file']}:{line['line']}: "
    text += f"{line['old']} -> {line['new'] or '(dropped)'}   {line['text']}"
    if "verdict" in line:
        text += f"\n   {line['verdict']} after {line['seconds']} s {line['test']}"
    return text


def main() -> None:
    """Do what the command says."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # and the tests end, too
    if sys.argv[1:2] == ["record_here"]:
        sys.exit(record_here(sys.argv[2], sys.argv[3:]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["list", "record", "run", "whole"])
    parser.add_argument("folder", nargs="?", type=Path, help="outside of the repository")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one place's tests")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of places, as in the list")
    parser.add_argument("--tests", nargs="+", help="files of tests, instead of those recorded")
    args = parser.parse_args()
    if args.command == "list":
        sources = code_files(ROOT)
        for number, (place, new) in enumerate(drawn(sources), 1):
            changed(sources[place.file], place, new)
            print(told({"place": number} | in_words(place, new, sources[place.file])))
        return
    if not args.folder or args.folder.resolve().is_relative_to(ROOT):
        parser.error("name a FOLDER outside of the repository")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if args.command == "record":
        record(folder, args.tests or [])
    else:
        run(folder, args)


if __name__ == "__main__":
    main()
