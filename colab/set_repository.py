"""Sets the address of the repository: `python colab/set_repository.py OWNER/NAME`.

The address is defined in pyproject.toml, under [project.urls]. This script writes it
there and into the files that cannot read it from there: the first cell and the badges
of each notebook, the README and the scripts in configs/launch. It can be run again with
another address.

A URL is accepted as well: `https://github.com/OWNER/NAME` or, for tests, `file:///PATH`.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GITHUB = "https://github.com/"
# A slug in the address of a page or of a badge; OWNER/NAME until it is set.
SLUG = r"[\w.-]+/[\w.-]+"
URL_LINE = re.compile(r'^Repository = "(.*?)"', re.MULTILINE)
CELL_LINE = re.compile(r'^REPOSITORY = ".*?"', re.MULTILINE)
BADGE_SLUG = re.compile(rf"(?<=github/){SLUG}(?=/blob/main/colab/)")
PAGE_SLUG = re.compile(rf"(?<=https://github\.com/){SLUG}(?=/blob/main/colab/)")


def repository_url(argument: str) -> str:
    """Returns the URL of OWNER/NAME, or a URL without its trailing slash and ".git"."""
    if re.fullmatch(SLUG, argument):
        return GITHUB + argument
    if re.fullmatch(r"(https|file)://[^\s\"'\\{}$]+", argument):
        return argument.removesuffix("/").removesuffix(".git")
    raise SystemExit(f"{argument!r} is neither OWNER/NAME nor an https or file URL.")


def replace_slugs(text: str, url: str) -> str:
    """Points badges and links to notebooks at a repository on GitHub."""
    slug = url.removeprefix(GITHUB)
    if not re.fullmatch(SLUG, slug):
        return text  # Colab and Kaggle open notebooks from GitHub only
    return PAGE_SLUG.sub(slug, BADGE_SLUG.sub(slug, text))


def update_notebook(text: str, url: str) -> str:
    """Returns the JSON of a notebook with the address in its cells."""
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = CELL_LINE.sub(f'REPOSITORY = "{url}"', source)
        else:
            source = replace_slugs(source, url)
        cell["source"] = source.splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def set_repository(root: Path, url: str) -> list[Path]:
    """Writes the address into the files below `root`; returns those that changed."""
    files = [root / "pyproject.toml", root / "README.md"]
    scripts = sorted(root.glob("configs/launch/*"))
    files += [*scripts, *sorted((root / "colab").glob("*.ipynb"))]
    before = {path: path.read_text(encoding="utf-8") for path in files}
    project, readme, notebooks = files[0], files[1], files[2 + len(scripts) :]
    (old_url,) = URL_LINE.findall(before[project])
    after = {project: URL_LINE.sub(f'Repository = "{url}"', before[project])}
    after[readme] = replace_slugs(before[readme].replace(old_url, url), url)
    after |= {path: before[path].replace(old_url, url) for path in scripts}
    after |= {path: update_notebook(before[path], url) for path in notebooks}
    changed = [path for path in files if after[path] != before[path]]
    for path in changed:
        path.write_text(after[path], encoding="utf-8")
    return changed


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    for changed_path in set_repository(ROOT, repository_url(sys.argv[1])):
        print(changed_path.relative_to(ROOT))
