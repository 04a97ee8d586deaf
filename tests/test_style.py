"""Conventions that no tool checks; each test lists all places that break its rule."""

import ast
import fnmatch
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = [*sorted((ROOT / "gptjax").rglob("*.py")), *sorted((ROOT / "tests").rglob("*.py"))]
TREES = {str(f.relative_to(ROOT)): ast.parse(f.read_text(encoding="utf-8")) for f in FILES}
PACKAGE = {  # module without the package, such as "data.lm": its syntax tree
    re.sub(r"(^|/)gptjax/|\.py$|/?__init__", "", name).replace("/", ".") or "gptjax": tree
    for name, tree in TREES.items()
    if name.startswith("gptjax/")
}
IMPORTERS = {  # dependency: the modules that may import it
    "IPython": ["cli.notebook"],
    "click": ["cli.*"],
    "flax": ["model.*"],
    "google_crc32c": ["weights.tf_checkpoint"],
    "grain": ["data.lm"],
    "huggingface_hub": ["weights.*"],
    "jinja2": ["tokenizer.template_worker"],
    "lazy_loader": ["book", "gptjax"],
    "lm_eval": ["evaluation.lm_harness"],
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
    "tensorboard": ["tracking.trackers"],
    "tomli_w": ["training.run_dir"],
    "trackio": ["tracking.trackers"],
    "wandb": ["tracking.trackers"],
}
# They execute what a file says, or are other frameworks: no module may import them.
IMPORTERS |= dict.fromkeys(("pickle", "cloudpickle", "dill", "marshal", "shelve"), ())
IMPORTERS |= dict.fromkeys(("joblib", "yaml", "torch", "tensorflow"), ())


def walk(trees, *kinds):
    """(module or file, node) of the syntax nodes of these kinds."""
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield name, node


def test_each_dependency_is_imported_by_one_package_or_module():
    unexpected, used = [], set()
    for module, node in walk(PACKAGE, ast.Import, ast.ImportFrom):
        for alias in node.names:
            name = alias.name if isinstance(node, ast.Import) else f"{node.module}.{alias.name}"
            dependency = name.split(".")[0]
            patterns = IMPORTERS.get(dependency, ["*"])
            matches = [p for p in patterns if fnmatch.fnmatchcase(module, p)]
            used |= {(dependency, pattern) for pattern in matches}
            if not matches or name in ("importlib", "importlib.import_module"):
                unexpected.append(f"{module} {dependency}")

    assert not unexpected
    assert {(d, p) for d, patterns in IMPORTERS.items() for p in patterns} <= used


def axes_suffix(node):
    """The axes that a name ends in, or None."""
    name = getattr(node, "attr", getattr(node, "id", getattr(node, "arg", "")))
    found = re.search(r"_([A-Z]+)$", name)
    return found and found[1]


def test_names_of_arrays_end_in_the_letters_of_einsum():
    named = []
    for file, node in walk(TREES, ast.Call, ast.Assign):
        call = node.value if isinstance(node, ast.Assign) else node
        match call:
            case ast.Call(
                func=ast.Attribute(attr="einsum"), args=[ast.Constant(str(spec)), *operands]
            ):
                inputs, output = spec.split("->")
                axes = [output] if isinstance(node, ast.Assign) else inputs.split(",")
                arrays = node.targets if isinstance(node, ast.Assign) else operands
                named += [
                    (file, *pair) for pair in zip(axes, map(axes_suffix, arrays), strict=True)
                ]

    assert len([suffix for *_, suffix in named if suffix]) > 20
    assert not [found for found in named if found[2] not in (None, found[1])]


def test_annotated_axes_are_the_letters_of_the_name():
    """`x_BTD: Float[Array, "B T D"]`; a leading `*N` is an axis that may be absent."""
    wrong = []
    for module, node in walk(PACKAGE, ast.arg, ast.AnnAssign):
        suffix = axes_suffix(node if isinstance(node, ast.arg) else node.target)
        match node.annotation:
            case ast.Subscript(
                value=ast.Name(), slice=ast.Tuple(elts=[_, ast.Constant(str(axes))])
            ) if suffix and "*" not in axes and "".join(axes.split()) != suffix:
                wrong.append((module, axes))

    assert not wrong
