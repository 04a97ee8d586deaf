"""Conventions that no tool checks; each test lists all places that break its rule."""

import ast
import collections
import fnmatch
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = sorted((ROOT / "gptjax").rglob("*.py"))
FILES = [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py"))]
IMPORTERS = {  # dependency: the modules that may import it
    "IPython": ["cli.notebook"],
    "click": ["cli.*"],
    "flax": ["model.*"],
    "google_crc32c": ["weights.tf_checkpoint"],
    "grain": ["data.lm"],
    "huggingface_hub": ["weights.hub"],
    "jinja2": ["tokenizer.template_worker"],
    "lazy_loader": ["book", "gptjax"],
    "matplotlib": ["plots.*"],
    "ml_dtypes": ["weights.*"],
    "openai": ["evaluation.llm_judge"],
    "optax": ["book.learning_rate", "training.*"],
    "orbax": ["checkpoint.checkpoint"],
    "pooch": ["fileio.download"],
    "prompt_toolkit": ["cli.chat"],
    "regex": ["tokenizer.*"],
    "safetensors": ["weights.*"],
    "tiktoken": ["tokenizer.tokenizer"],
    "tomli_w": ["training.run_dir"],
    "tqdm": ["data.text", "inference.label_file"],
}
# They execute what a file says, or are other frameworks: no module may import them.
IMPORTERS |= dict.fromkeys(("pickle", "cloudpickle", "dill", "marshal", "shelve"), ())
IMPORTERS |= dict.fromkeys(("joblib", "yaml", "torch", "tensorflow"), ())
IRREGULAR_PARTICIPLES = {
    *("begun", "built", "chosen", "drawn", "found", "given", "heard", "held", "kept"),
    *("known", "left", "lost", "made", "met", "seen", "sent", "shown", "slept"),
    *("sought", "taken", "told", "written"),
}
VERBS_IN_ED = {"embed", "feed", "need", "seed", "shed", "speed"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def module_name(file):
    """The module of a file, without the package: "data.lm"."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts[1:] if part != "__init__") or parts[0]


def nodes(file, *kinds):
    """(location, node) of the syntax nodes of these kinds."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, kinds):
            line = getattr(node, "lineno", 1)
            yield f"{file.relative_to(ROOT)}:{line}", node


def imports(file):
    """(location, full name) of each import, also those inside functions."""
    for place, node in nodes(file, ast.Import, ast.ImportFrom):
        for alias in node.names:
            is_plain = isinstance(node, ast.Import)
            yield place, alias.name if is_plain else f"{node.module}.{alias.name}"


def test_each_dependency_is_imported_by_one_package_or_module():
    unexpected, used = [], set()
    for file in PACKAGE:
        for place, name in imports(file):
            dependency = name.split(".")[0]
            patterns = IMPORTERS.get(dependency, ["*"])
            matches = [p for p in patterns if fnmatch.fnmatchcase(module_name(file), p)]
            used |= {(dependency, pattern) for pattern in matches}
            if not matches:
                unexpected.append(f"{place} {dependency}")

    assert not unexpected
    assert {(d, p) for d, patterns in IMPORTERS.items() for p in patterns} <= used


def test_no_module_imports_others_by_name():
    found = [
        place
        for file in PACKAGE
        for place, name in imports(file)
        if name in ("importlib", "importlib.import_module")
    ]

    assert not found


def axes_suffix(node):
    """The axes that a name ends in, or None."""
    if isinstance(node, ast.Attribute):
        node = ast.Name(node.attr)
    if not isinstance(node, ast.Name):
        return None
    found = re.search(r"_([A-Z]+)$", node.id)
    return found and found[1]


def einsums(file):
    """(location, letters, node) for each operand and each target of each einsum."""
    for place, node in nodes(file, ast.Call, ast.Assign):
        call = node.value if isinstance(node, ast.Assign) else node
        match call:
            case ast.Call(
                func=ast.Attribute(attr="einsum"), args=[ast.Constant(str(spec)), *operands]
            ):
                inputs, output = spec.split("->")
                pairs = (
                    [(output, target) for target in node.targets]
                    if isinstance(node, ast.Assign)
                    else zip(inputs.split(","), operands, strict=True)
                )
                yield from ((place, letters, operand) for letters, operand in pairs)


def test_names_of_arrays_end_in_the_letters_of_einsum():
    named = [
        (place, letters, axes_suffix(node))
        for file in FILES
        for place, letters, node in einsums(file)
        if axes_suffix(node)
    ]

    assert len(named) > 20
    assert not [(p, letters, s) for p, letters, s in named if letters != s]


def test_annotated_axes_are_the_letters_of_the_name():
    """`x_BTD: Float[Array, "B T D"]`; a leading `*N` is an axis that may be absent."""
    wrong = []
    for file in PACKAGE:
        for place, node in nodes(file, ast.arg, ast.AnnAssign):
            name = ast.Name(node.arg) if isinstance(node, ast.arg) else node.target
            match node.annotation:
                case ast.Subscript(
                    value=ast.Name(), slice=ast.Tuple(elts=[_, ast.Constant(str(axes))])
                ) if axes_suffix(name) and "*" not in axes:
                    if "".join(axes.split()) != axes_suffix(name):
                        wrong.append((place, axes))

    assert not wrong


def top_level_names(file):
    """The public functions, classes and constants that a module defines."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            yield node.name
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets if isinstance(node, ast.Assign | ast.AnnAssign) else []:
            yield from (n.id for n in ast.walk(target) if isinstance(n, ast.Name))


def test_a_public_name_is_defined_once_in_the_package():
    modules = collections.defaultdict(set)
    for file in PACKAGE:
        for name in top_level_names(file):
            if not name.startswith("_") and name != "main":
                modules[name].add(module_name(file))

    assert not {name: found for name, found in modules.items() if len(found) > 1}


def test_no_function_is_named_by_a_bare_participle():
    found = [
        f"{place} {node.name}"
        for file in PACKAGE
        for place, node in nodes(file, *FUNCTIONS)
        if (name := node.name.strip("_")) in IRREGULAR_PARTICIPLES
        or (re.fullmatch("[a-z]+ed", name) and name not in VERBS_IN_ED)
    ]

    assert not found


@pytest.mark.fast
def test_importing_the_package_imports_nothing_heavy():
    code = "import gptjax, gptjax.cli, sys; gptjax.GPTConfig(); print(*sys.modules)"

    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout

    loaded = {name.split(".")[0] for name in output.split()}
    assert "gptjax" in loaded
    heavy = {*IMPORTERS, "jax", "numpy"} - {"lazy_loader"} - sys.stdlib_module_names
    assert not loaded & heavy
