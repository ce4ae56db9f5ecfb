"""The notebook runs; `python tests/test_notebook.py` also writes its outputs, which the site shows."""

import re
import tempfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "first_map.ipynb"
# The cell whose output needs a kernel.
SLIDERS = "sliders"
MOST_BYTES = 1_500_000


def execute(folder):
    """The notebook with its outputs, run in a folder."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # Without the state of widgets, nbclient cannot run sliders.
    client = NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(folder)}})
    client.execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        if cell.id == SLIDERS:
            cell.outputs = []
    return notebook


def check_outputs(notebook):
    """No message in the outputs, no path of this machine, and pictures of all steps."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert not [path for path in (tempfile.gettempdir(), str(Path.home()), str(NOTEBOOK.parents[2])) if path in text]
    assert "attribution/pointing_game" in text
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 6


@pytest.mark.slow
def test_runs(tmp_path):
    check_outputs(execute(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_written_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check_outputs(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert NOTEBOOK.stat().st_size < MOST_BYTES


def test_links():
    """The site does not rewrite the links of notebooks, which name the built pages."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 1
    for link in links:
        assert (NOTEBOOK.parent / link.replace(".html", ".md")).is_file(), link


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as empty:
        executed = execute(empty)
    check_outputs(executed)
    nbformat.write(executed, NOTEBOOK)
