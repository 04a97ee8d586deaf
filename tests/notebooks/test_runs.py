"""Every notebook runs from top to bottom, its own assertions included."""

import pytest

from tests.notebook_runs import executed, pictures
from tests.notebooks.test_notebooks import NOTEBOOKS

pytestmark = pytest.mark.notebooks

NEED_DATA = ("01", "04", "06", "07", "10")  # that other machines download
# 05 last: it takes the programs of 00 from the compilation cache.
ORDER = sorted(NOTEBOOKS, key=lambda path: path.stem.startswith("05"))


@pytest.mark.parametrize("path", ORDER, ids=lambda path: path.stem)
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
