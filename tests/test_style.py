"""The conventions of the code, each as a test; the tables here are the rules."""

import ast
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "gptjax").rglob("*.py"))
FILES = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py"))]

ROWS = [  # imports point upwards; files of one row, unless of one folder, are strangers
    ["errors", "strict_json"],
    [
        "config",
        "cpu",
        "tree",
        "bpe",
        "stopping",
        "stopwatch",
        "spikes",
        "download",
        "scores",
        "overlap",
        "terminal",
        "phases",
        "prefetch",
        "manifest",
        "run_lock",
        "rendering",
    ],
    [
        "programs",
        "fingerprint",
        "packing",
        "tokenizer",
        "template",
        "sampling",
        "machines",
        "sharding",
        "checksums",
        "step_folders",
        "changes",
        "supervise",
    ],
    ["attention.*"],
    ["cache", "layers"],
    ["model"],
    ["lora", "classifier"],
    ["loss", "optim", "collectives", "data.*", "checkpoint", "weights.*"],
    ["report", "run_folder", "chips", "decoding", "judge", "preview"],
    ["train", "generation", "evaluate", "prediction", "report_*", "boxes"],
    ["distributed", "budget", "run_task"],
    ["machine_faults", "going_back"],
    ["run_steps"],
    ["run_loop", "trainable", "starting", "answering", "figures"],
    ["examine", "ahead"],
    ["pretrain", "classification", "instruct", "preference", "chat", "judged"],
    ["quickstart", "doctor", "flags", "launch", "plan", "bench.*", "book.*"],
    ["command"],
    ["data_cli", "train_cli"],
    ["cli"],
    ["__main__", "gptjax", "notebook"],
]
DOORS = {  # dependency: the modules that may import it
    "flax": ["layers", "model"],
    "grain": ["data.batches"],
    "jinja2": ["rendering", "launch"],
    "matplotlib": ["report", "report_classes", "boxes", "figures"],
    "optax": ["loss", "classifier", "optim", "train"],
    "orbax": ["checkpoint"],
    "prompt_toolkit": ["chat"],
    "safetensors": ["weights.*"],
    "tiktoken": ["tokenizer"],
    "tyro": ["flags"],
}
FORBIDDEN = {  # run what a file says, or belong to another framework
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"),
    *("torch", "tensorflow"),
}


def name_of(file):
    """The module of a file, without the package: "data.text_column"."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts[1:] if part != "__init__") or parts[0]


def each(files):
    return pytest.mark.parametrize(
        "file", files, ids=lambda file: str(file.relative_to(ROOT))
    )


def nodes(file, *kinds):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def imports(file):
    """Full names of all that a file imports, inside functions too."""
    for node in nodes(file, ast.Import, ast.ImportFrom):
        assert not getattr(node, "level", 0), "a relative import"
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def row_of(module):
    """The row of a module, which must be in exactly one."""
    rows = [
        n
        for n, patterns in enumerate(ROWS)
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
    ]
    assert len(rows) == 1, f"{module} is in rows {rows} of the table"
    return rows[0]


MODULES = {name_of(file): file for file in PACKAGE}
FOLDERS = {name for name in MODULES if (ROOT / "gptjax" / name).is_dir()}


@pytest.mark.fast
@each(FILES)
def test_files_and_functions_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400

    for node in nodes(file, ast.FunctionDef, ast.AsyncFunctionDef):
        assert node.end_lineno - node.lineno < 60, node.name


def test_no_file_is_a_drawer_for_everything():
    for file in FILES:
        assert not set(re.split(r"\W|_", name_of(file))) & {
            *("util", "utils", "helper", "helpers", "common", "misc")
        }, file


@each(PACKAGE)
def test_nothing_is_asserted_evaluated_or_executed(file):
    assert not nodes(file, ast.Assert)

    calls = [node.func for node in nodes(file, ast.Call)]
    names = {func.id for func in calls if isinstance(func, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__"}


@each(PACKAGE)
def test_nothing_is_imported_that_runs_files_or_is_another_framework(file):
    assert not {name.split(".")[0] for name in imports(file)} & FORBIDDEN


@each(PACKAGE)
def test_each_dependency_has_one_door(file):
    for name in imports(file):
        doors = DOORS.get(name.split(".")[0], ["*"])
        assert any(fnmatch.fnmatchcase(name_of(file), door) for door in doors), name


def test_each_door_is_used():
    for dependency, doors in DOORS.items():
        for door in doors:
            files = [MODULES[name] for name in fnmatch.filter(MODULES, door)]
            used = {name.split(".")[0] for file in files for name in imports(file)}
            assert dependency in used, (dependency, door)


@each(PACKAGE)
def test_imports_point_upwards(file):
    here = name_of(file)
    if here in FOLDERS:  # it stands in no row
        assert set(imports(file)) <= {"importlib", "typing.Any"}
        return
    for name in imports(file):
        if not name.startswith("gptjax."):
            continue
        parts = name.removeprefix("gptjax.").split(".")
        there = ".".join(parts if ".".join(parts) in MODULES else parts[:-1])
        same_folder = "." in here and here.split(".")[0] == there.split(".")[0]
        assert there not in FOLDERS, name
        assert same_folder or row_of(there) < row_of(here), name


def test_the_table_of_rows_lists_only_what_there_is():
    for pattern in [pattern for row in ROWS for pattern in row]:
        assert fnmatch.filter(MODULES, pattern), pattern


def suffix(node):
    """The axes that a name ends in, or None."""
    if isinstance(node, ast.Attribute):
        node = ast.Name(node.attr)
    if not isinstance(node, ast.Name):
        return None
    found = re.search(r"_([A-Z]+)$", node.id)
    return found and found[1]


def einsums(file):
    """(letters, node) for each operand and each target of each einsum."""
    for node in nodes(file, ast.Call):
        match node:
            case ast.Call(
                func=ast.Attribute(attr="einsum"),
                args=[ast.Constant(str(spec)), *operands],
            ):
                yield from zip(spec.split("->")[0].split(","), operands, strict=True)
    for node in nodes(file, ast.Assign):
        match node.value:
            case ast.Call(
                func=ast.Attribute(attr="einsum"), args=[ast.Constant(str(spec)), *_]
            ):
                yield from ((spec.split("->")[1], target) for target in node.targets)


@each(FILES)
def test_the_letters_of_names_are_those_of_einsum(file):
    for letters, node in einsums(file):
        assert suffix(node) in (None, letters), ast.unparse(node)


def test_there_are_einsums_whose_letters_are_checked():
    assert [pair for pair in einsums(MODULES["attention.plain"]) if suffix(pair[1])]


@each(PACKAGE)
def test_annotated_axes_are_the_letters_of_the_name(file):
    """`x_BTD: Float[Array, "B T D"]`; a leading `*N` is an axis that may be absent."""
    for node in nodes(file, ast.arg, ast.AnnAssign):
        name = ast.Name(node.arg) if isinstance(node, ast.arg) else node.target
        match node.annotation:
            case ast.Subscript(
                value=ast.Name(),
                slice=ast.Tuple(elts=[_, ast.Constant(str(axes))]),
            ) if suffix(name):
                letters = [axis for axis in axes.split() if axis[0] != "*"]
                assert "".join(letters) == suffix(name) or "*" in axes, axes


@each(PACKAGE)
def test_all_that_is_public_has_a_docstring(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    public = [node for node in tree.body if isinstance(node, kinds)]
    for node in list(public):
        public += [member for member in node.body if isinstance(node, ast.ClassDef)]

    for node in [tree, *public]:
        name = getattr(node, "name", "")
        if isinstance(node, (ast.Module, *kinds)) and not name.startswith("_"):
            empty = name == "" and not tree.body
            assert empty or ast.get_docstring(node), name


@pytest.mark.fast
def test_importing_the_package_imports_nothing_heavy():
    code = "import gptjax, gptjax.cli, sys; gptjax.GPTConfig(); print(*sys.modules)"

    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    loaded = {name.split(".")[0] for name in output.split()}
    assert "gptjax" in loaded
    assert not loaded & {*DOORS, "jax", "numpy"}


@pytest.mark.fast
@pytest.mark.parametrize("name", gptjax.__all__)
def test_every_public_name_is_there(name):
    assert name in dir(gptjax)
    assert getattr(gptjax, name) is not None


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'gptjax' has no attribute 'GTP'"):
        _ = gptjax.GTP
