"""Every notebook runs from top to bottom, its own assertions included."""

import pytest

from tests.notebook_runs import executed, pictures, run
from tests.notebooks.test_notebooks import FOLDER, NOTEBOOKS

pytestmark = pytest.mark.notebooks

NEED_DATA = ("01", "04", "06", "07")  # that other machines download


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_pictures(path, tmp_path, monkeypatch, request):
    if path.stem[:2] in NEED_DATA:
        request.getfixturevalue("shared_data")
    colab = int(path.stem[:2]) % 2 == 1  # half of them as on Colab, half as elsewhere

    notebook = executed(path, tmp_path, monkeypatch, colab)

    assert pictures(notebook) >= 1
    assert not [cell for cell in notebook.cells if "Traceback" in str(cell)]
    handed_over = tmp_path / "handed-over"
    assert handed_over.is_file() == colab
    assert not colab or int(handed_over.read_text()) > 100  # bytes


def test_an_expectation_that_is_not_met_is_a_failure(tmp_path, monkeypatch):
    source = (FOLDER / "03_the_gpt.ipynb").read_text(encoding="utf-8")
    wrong = tmp_path / "source.ipynb"
    wrong.write_text(source.replace("124_439_808", "124_439_809"), encoding="utf-8")

    with pytest.raises(Exception, match="AssertionError"):
        run(wrong, tmp_path, monkeypatch)
