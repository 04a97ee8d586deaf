"""Files for the tests of readers."""

import csv
import gzip
import io

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# One folder per test is enough: each example overwrites its files.
quick = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True, max_examples=25
)
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)


def write(path, content):
    """Writes a file, compressed if it ends in .gz."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def csv_text(rows, delimiter=","):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue()
