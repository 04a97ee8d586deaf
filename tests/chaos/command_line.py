"""Random command lines, each in a process of its own, with random files and streams.

A line that works is changed in up to three places: a word becomes a number, text or
path of another kind, or an option is added; a file of a folder becomes one of another
kind; a stream is closed, full or broken. A command may refuse, with a message and the
exit code 1 or 2. It may end with 0 only if what it promises is there and valid. It
never hangs, and has no errors but its own; a line that was not changed works.
"""

import contextlib
import csv
import dataclasses
import json
import math
import os
import queue
import random
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

import gptjax
from gptjax.cli.main import COMMANDS
from gptjax.data.token_files import verify_prepared
from gptjax.training.metrics import read_events
from gptjax.weights.load import load
from tests.chaos._zygote import Job
from tests.command_line import parse_command
from tests.conftest import ON_CPU
from tests.processes import ROOT, cache_options
from tests.small_models import make_model

RunJob = Callable[[Job], dict[str, Any]]

FULL, SLICE = 3000, 200
NUM_ZYGOTES = 2
MAX_MESSAGE_CHARS = 5000
TEXTS = ("ham: see you", "spam: win a prize", "ham: call me ü", "spam: free €")
FILES = {  # in the folder of each command
    "text.txt": "".join(f"{n} times {n} is {n * n}.\n" for n in range(60)),
    "input.txt": "spam: win\nham: see you\n",  # on stdin
    "texts.csv": "text\n" + "".join(f"{text}\n" for text in TEXTS),
    "labels.csv": "text,label\n" + "".join(f"{x},{x.split(':')[0]}\n" for x in TEXTS * 5),
    "shots.jsonl": '{"input": "woc", "output": "cow"}\n' * 2,
    "chat.jsonl": '{"instruction": "Add.", "input": "1 1", "output": "2"}\n' * 12,
    "config.toml": """
        [model]
        context_length = 64
        n_layers = 1
        n_heads = 2
        d_model = 8
        [data]
        source = "text.txt"
        tokenizer = "bytes"
        batch_size = 2
        [optim]
        warmup_steps = 0
        [train]
        steps = 2
        eval_batches = 1
        sample_prompt = ""
        """,
}
FOLDERS = ("lm", "classifier", "assistant", "prepared", "run")
SETUP = ("data prepare text.txt --tokenizer bytes --out prepared", "train config.toml --run run")
LINES = (  # each works
    "generate lm Hello --max-new-tokens 3",
    "generate run --max-new-tokens 3 --stop x --stop y",
    "generate lm Hello --samples 2 --json --max-new-tokens 3 --top-k 5 --top-p 0.9",
    "generate lm woc --few-shot shots.jsonl --max-new-tokens 3",
    "generate assistant Hi --chat --max-new-tokens 3",
    "classify classifier ham spam --json",
    "classify classifier",
    "classify classifier --file texts.csv --out out.csv",
    "chat assistant --max-new-tokens 3 --temperature 0",
    "chat lm --max-new-tokens 3",
    "eval lm --text text.txt --stride 16 --json",
    "eval classifier --classification-data labels.csv --json",
    "eval assistant --chat-data chat.jsonl --out out.jsonl --json",
    "import lm --out out",
    "export lm --to hf --out out",
    "export run --to book --out out",
    "data fetch verdict",
    "data prepare text.txt texts.csv --tokenizer bytes --out out --workers 1",
    "data prepare text.txt --tokenizer bpe:260 --out out --val-fraction 0.2 --seed 1",
    "data preview chat.jsonl --tokenizer bytes --context 64 --json",
    "data preview chat.jsonl --tokenizer bytes --html out.html",
    "data preview prepared",
    "data verify prepared",
    "plan config.toml --no-compile --json",
    "plan config.toml --topology v5e:2x4 --no-compile --data.batch_size 8",
    "train config.toml --run out",
    "train config.toml --run run --train.steps 3 --allow-change train.steps",
    "doctor",
    "quickstart --run text.txt",  # no folder
    "bench --repeats 0",
)
REFUSED = ("quickstart", "bench")  # a line without a mistake would take minutes
NUMBERS = (
    *("0", "1", "2", "3", "-1", "-0", "0.5", "1e-9", "1e30", "nan", "-inf", "9" * 31, "1_0"),
    *("2147483648", "9223372036854775807", "9223372036854775808", "0x2", "٣", "½", "3000000000000"),
)
NUMBER_METAVARS = ("N", "X", "P", "T", "SECONDS", "INT", "FLOAT")
WORDS = (
    *("", " ", "ü", "日本語", "👩‍👩‍👧", "\x1b[2J\x1b]0;x\x07", "a\0b", "\udcff", "x" * 10_000),
    *("%s {0}", "\n", "<|endoftext|>", "bpe:300", "bpe:" + "9" * 30, "bytes", "owner/name", "-"),
    *("--no", "~", "~nobody/x", "v5e:0x9", "cpu:" + "9" * 12, "true", "text", "[[", "x:1,2,3"),
    *("--", "\u202e"),
)
# Kinds of files: names of those that are not there, prefixes of names, contents, rest.
ABSENT = {"missing": "{}", "deeper": "none/{}", "child": "text.txt/{}"}
ABSENT |= {"long": "x" * 300 + "{}", "nul": "x\0{}"}
PREFIXES = {"surrogate": "\udcff", "newline": "\n", "unicode": "ü日", "escape": "\x1b[2J"}
CONTENTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "binary": lambda data: random.Random(0).randbytes(3000),
    "utf16": lambda data: data.decode(errors="replace").encode("utf-16"),
    "bom": lambda data: b"\xef\xbb\xbf" + data,
    "cut": lambda data: data[: len(data) // 2],
}
MAKERS: dict[str, Callable[[Path], Any]] = {
    "folder": Path.mkdir,
    "fifo": os.mkfifo,
    "zero": lambda path: make_device(path, 5),
    "full": lambda path: make_device(path, 7),
    "broken": lambda path: path.symlink_to("missing"),
    "loop": lambda path: path.symlink_to(path.name),
    "link": lambda path: path.symlink_to("text.txt"),
    "unreadable": lambda path: path.touch(0),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 28)),
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
}
KINDS = (*ABSENT, *PREFIXES, *CONTENTS, *MAKERS)


def random_words(rng: random.Random, folder: Path) -> tuple[list[str], bool]:
    """A command line, and whether it or the folder was changed."""
    line = shlex.split(rng.choice(LINES))
    words = list(line)
    changes = rng.choices((replace_word, add_option, damage_folder, drop), (4, 3, 3, 1), k=3)
    changes = changes[: rng.choice((0, 1, 1, 1, 2, 3))]
    for change in changes:
        change(rng, folder, words)
    if line[0] in REFUSED:
        words = [line[0], *words[1:], *line[1:]]  # the last value of an option counts
    is_offline = line[:2] == ["data", "fetch"]  # not every machine has the file
    return words, bool(changes) or is_offline or line[0] in REFUSED


def replace_word(rng: random.Random, folder: Path, words: list[str]) -> None:
    at = rng.randrange(1 + (words[:1] == ["data"]), len(words) + 1)
    if words[at : at + 1] and not words[at].startswith("--"):
        words[at] = random_value(rng, folder, Path(words[at]).suffix)
    else:
        words.insert(at + 1, random_value(rng, folder, ".txt"))


def add_option(rng: random.Random, folder: Path, words: list[str]) -> None:
    options = [x for x in command_of(words).params if isinstance(x, click.Option)]
    if not options:
        words.append(random_value(rng, folder, ".txt"))
        return
    option = rng.choice(options)
    words.append(rng.choice(option.opts))
    choices, kind = str(option.metavar).split("|"), rng.random()
    if option.is_flag:
        return
    if option.metavar in NUMBER_METAVARS and kind < 0.8:
        words.append(rng.choice(NUMBERS))
    elif len(choices) > 1 and kind < 0.5:
        words.append(rng.choice(choices))
    else:
        words.append(random_value(rng, folder, ".txt"))


def drop(rng: random.Random, folder: Path, words: list[str]) -> None:
    if len(words) > 1:
        del words[rng.randrange(len(words))]


def damage_folder(rng: random.Random, folder: Path, words: list[str]) -> None:
    """Replaces a file or folder in a folder of the command line by another kind."""
    named = [word for word in words if word in FOLDERS]
    paths = [path for name in named for path in sorted((folder / name).rglob("*"))]
    if paths := [path for path in paths if not path.is_symlink()]:
        make_file(rng.choice(KINDS), rng.choice(paths))


def command_of(words: Sequence[str]) -> click.Command:
    commands: Any = COMMANDS
    for word in words:
        if not isinstance(commands, click.Group) or word not in commands.commands:
            break
        commands = commands.commands[word]
    return commands


def random_value(rng: random.Random, folder: Path, suffix: str) -> str:
    if rng.random() < 0.3:
        return rng.choice(NUMBERS)
    if rng.random() < 0.3:
        return rng.choice(WORDS)
    if rng.random() < 0.2:
        return rng.choice((*FILES, *FOLDERS, "."))
    kind = rng.choice(KINDS)
    if suffix == ".toml" and kind in ("empty", "unreadable"):
        kind = "binary"  # an empty config is valid: it trains a GPT-2 for hours
    return make_file(kind, folder / f"other{suffix}")


def make_file(kind: str, path: Path) -> str:
    """Makes a file of a kind at the path or beside it; returns its path from there."""
    data = b"text,label\nham: ok,ham\nspam,spam\n"
    if path.is_file() and path.stat().st_size < 1 << 20:
        data = path.read_bytes()
    if kind in PREFIXES:
        path = path.with_name(PREFIXES[kind] + path.name)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind in MAKERS:
        MAKERS[kind](path)
    elif kind not in ABSENT:
        path.write_bytes(CONTENTS.get(kind, bytes)(data))
    return ABSENT.get(kind, "{}").format(path.name)


def make_device(path: Path, minor: int) -> None:
    """A device of one's own: a command that replaces it does no harm."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    except PermissionError:
        path.symlink_to({5: "/dev/zero", 7: "/dev/full"}[minor])


def disturb_streams(rng: random.Random, folder: Path, job: Job) -> None:
    """Closes, fills or breaks one of the streams, or gives it other content."""
    match rng.choice(("stdin", "stdout", "stderr", "encoding")):
        case "encoding":
            job["encoding"] = "ascii"
        case "stdin":
            kind = rng.choice(("", "empty", "folder", "binary", "bom", "zero", "utf16"))
            job["stdin"] = kind and str(folder / make_file(kind, folder / "input.txt"))
        case name:
            make_device(folder.parent / "full", 7)
            job[name] = rng.choice(("", "broken", str(folder.parent / "full")))


@contextlib.contextmanager
def open_zygote(folder: Path) -> Iterator[RunJob]:
    """Yields a function that runs a job."""
    variables = {
        **cache_options(folder),
        **ON_CPU,  # programs are compiled quickly, and run for milliseconds
        **{"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)},
        **{"GPTJAX_OFFLINE": "1", "HOME": str(folder / "home"), "OPENBLAS_NUM_THREADS": "1"},
    }
    command = [sys.executable, "-m", "tests.chaos._zygote"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, **pipes) as zygote:

        def run_job(job: Job) -> dict[str, Any]:
            zygote.stdin.write(json.dumps(job) + "\n")
            zygote.stdin.flush()
            return json.loads(zygote.stdout.readline())

        yield run_job
        zygote.stdin.close()


def write_inputs(folder: Path, run_job: RunJob) -> None:
    """Writes the files and folders that commands read."""
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    shape = {"context_length": 64, "n_layers": 1, "n_heads": 2, "d_model": 8}
    models = {
        "lm": make_model(**shape),
        "classifier": make_model(**shape, n_classes=2),
        "assistant": make_model(**shape),
    }
    changes: dict[str, Any] = {
        "classifier": {"labels": ("ham", "spam")},
        "assistant": {
            "chat_template": "{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}"
        },
    }
    for name, model in models.items():
        gptjax.save(dataclasses.replace(model, **changes.get(name, {})), folder / name)
    for line in SETUP:
        job = make_job(shlex.split(line), folder)
        result = run_job(job)
        if result["code"]:
            raise RuntimeError(f"{line}: {result} {Path(job['stderr']).read_text()}")


def make_job(words: list[str], folder: Path) -> Job:
    stdin, stdout, stderr = folder / "input.txt", *map(folder.with_name, ("stdout", "stderr"))
    return Job(
        words=words,
        folder=str(folder),
        stdin=str(stdin),
        stdout=str(stdout),
        stderr=str(stderr),
        encoding="utf-8",
    )


def run(seed: int, cases: Sequence[int], folder: Path) -> Iterator[str]:
    """Yields the fault of each case; a few run at a time."""
    (folder / "home").mkdir()
    (folder / "first").mkdir()
    inputs, zygotes = folder / "first" / "inputs", queue.SimpleQueue[RunJob]()

    def check(case: int) -> str:
        work, run_job = folder / str(case) / "work", zygotes.get()
        try:
            shutil.copytree(inputs, work, symlinks=True)
            return run_case(random.Random(f"{seed} {case}"), work, run_job)
        finally:
            zygotes.put(run_job)
            shutil.rmtree(work.parent)

    with contextlib.ExitStack() as stack:
        for run_job in [stack.enter_context(open_zygote(folder)) for _ in range(NUM_ZYGOTES)]:
            zygotes.put(run_job)
        write_inputs(inputs, run_job)
        executor = stack.enter_context(ThreadPoolExecutor(NUM_ZYGOTES))
        yield from executor.map(check, cases)


def run_case(rng: random.Random, work: Path, run_job: RunJob) -> str:
    words, is_changed = random_words(rng, work)
    job = make_job(words, work)
    if rng.random() < 0.3:
        disturb_streams(rng, work, job)
        is_changed = True
    fault = find_fault(job, run_job(job), is_changed)
    names = [Path(job[x]).name for x in ("stdin", "stdout", "stderr", "encoding")]
    return fault and f"{fault}\n  gptjax {shlex.join(words)!r:.600} {names}"


def read_output(target: str) -> str | None:
    """Reads the output in a regular file; None without such a file."""
    path = Path(target)
    return path.read_bytes().decode("utf-8", "replace") if target and path.is_file() else None


def find_fault(job: Job, result: dict[str, Any], is_changed: bool) -> str:
    code, complaint = result["code"], read_output(job["stderr"])
    if result["is_hung"]:
        return f"no end after {result['seconds']:.0f} s"
    if result["report"] or code not in (0, 1, 2, 75):
        return f"exit code {code}: {result['report']} {complaint or ''}"
    if complaint is not None:
        if "Traceback" in complaint or "Exception ignored" in complaint:
            return f"exit code {code}: {complaint}"
        if code and not complaint.strip() and job["words"][:2] != ["data", "verify"]:
            return f"exit code {code} without a message"
        if len(complaint) > MAX_MESSAGE_CHARS:
            return f"a message of {len(complaint)} characters: {complaint[:1000]}"
        if controls := set(complaint) & set(map(chr, range(32))) - set("\n\t\r"):
            return f"control characters {controls} in {complaint!r}"
    if left := list(Path(job["folder"]).rglob(".gptjax-*")):
        return f"exit code {code} leaves {left}"
    if code:
        return "" if is_changed else f"exit code {code}: {complaint}"
    try:
        return missing_result(job)
    except Exception as error:
        return f"exit code 0, but {type(error).__name__}: {error} {complaint}"


def missing_result(job: Job) -> str:
    """Returns the missing or invalid output of a command that ended with 0, or ""."""
    words, folder = job["words"], Path(job["folder"])
    if "--help" in words:
        return ""
    command, options = parse_command(words)
    text = read_output(job["stdout"])
    lines = text.splitlines() if text else []
    out = options.get("out") and folder / options["out"]
    promised = "" if job["stdout"] == "broken" or text else "exit code 0 without output"
    match command.name:
        case "import":
            return "" if load(out) else "no model"
        case "export":
            load(out) if options["layout"] == "hf" else None
            return "" if any(out.iterdir()) else "nothing is exported"
        case "prepare":
            return "; ".join(verify_prepared(out))
        case "train":
            run_dir = folder / options["run_dir"]
            load(run_dir)
            events = read_events(run_dir / "metrics.jsonl")
            return "" if events[-1]["step"] and (run_dir / "report.md").is_file() else "no report"
        case "classify" if options["file"]:
            number = count_rows(folder / options["file"])
            return "" if count_rows(out) == number else "other rows"
        case "preview" if options["html"]:
            return "" if "<html" in (folder / options["html"]).read_text() else "no page"
        case "eval" if options["chat_data"] and options["out"] and not out.is_file():
            return "no answers"
        case "generate" | "classify" | "preview" | "plan" | "eval" if options.get("as_json"):
            for line in lines:
                values = json.loads(line)
                numbers = [x for x in values.values() if isinstance(x, float)]
                if not all(map(math.isfinite, numbers)):
                    return f"numbers: {numbers}"
        case "fetch" if lines:
            return "" if Path(lines[-1]).is_file() else f"no file {lines[-1]}"
        case "chat" | "classify" | "verify" if not options.get("texts"):
            return ""  # stdin may be empty; the result of verify is its exit code
        case "quickstart" | "bench":
            return "it did not refuse"
    return promised


def count_rows(path: Path) -> int:
    if path.suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            return sum(1 for row in csv.reader(file) if row) - 1  # the header
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        return len(json.loads(text))
    return sum(1 for line in text.split("\n") if line.strip())
