"""Conventions that no tool checks; each test lists all places that break its rule."""

import ast
import collections
import fnmatch
import re
from pathlib import Path

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
            if not matches or name in ("importlib", "importlib.import_module"):
                unexpected.append(f"{place} {dependency}")

    assert not unexpected
    assert {(d, p) for d, patterns in IMPORTERS.items() for p in patterns} <= used


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
        match node:
            case ast.Call(
                func=ast.Attribute(attr="einsum"), args=[ast.Constant(str(spec)), *operands]
            ):
                inputs, _ = spec.split("->")
                for letters, operand in zip(inputs.split(","), operands, strict=True):
                    yield place, letters, operand
            case ast.Assign(
                targets=[target],
                value=ast.Call(func=ast.Attribute(attr="einsum"), args=[ast.Constant(spec), *_]),
            ):
                yield place, spec.split("->")[1], target


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


def test_a_public_name_is_defined_once_in_the_package():
    modules = collections.defaultdict(set)
    for file in PACKAGE:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            for name in names:
                if not name.startswith("_") and name != "main":
                    modules[name].add(module_name(file))

    assert not {name: found for name, found in modules.items() if len(found) > 1}
