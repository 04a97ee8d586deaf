"""Executed notebooks in a headless browser, as wide as a desktop and a phone."""

import shutil

import pytest

from tests.notebook_runs import executed, pictures
from tests.notebooks.test_notebooks import NOTEBOOKS

nbconvert = pytest.importorskip("nbconvert", reason="needs [dev]")
playwright = pytest.importorskip("playwright.sync_api", reason="needs [dev]")

pytestmark = pytest.mark.notebooks

# Elements beyond the right edge, and the width of each picture.
OUTSIDE = """() => [...document.querySelectorAll("main *")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .filter(e => !e.closest("pre, .highlight, .MathJax"))
    .map(e => e.outerHTML.slice(0, 120))"""
SHOWN = """() => [...document.querySelectorAll("main .jp-OutputArea img")]
    .map(e => e.naturalWidth ? e.getBoundingClientRect().width : 0)"""


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as play:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        args = ["--no-sandbox", "--disable-gpu"]
        with play.chromium.launch(executable_path=program, args=args) as browser:
            yield browser


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_is_cut_off_and_pictures_can_be_read(path, tmp_path, monkeypatch, browser):
    notebook = executed(path, tmp_path, monkeypatch)
    html, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")

    for width, least in ((1280, 400), (390, 250)):  # pixels: of the window, a picture
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto((tmp_path / "page.html").as_uri(), wait_until="domcontentloaded")
        shown = page.evaluate(SHOWN)
        assert len(shown) == pictures(notebook) >= 1
        assert min(shown) > least
        assert page.evaluate(OUTSIDE) == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()
