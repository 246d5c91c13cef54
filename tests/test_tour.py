"""The notebook in docs/: it is what its script makes, it was run, and it runs."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "tour.py"))
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def test_notebook_is_the_one_of_the_script_and_was_run() -> None:
    found, made = nbformat.read(NOTEBOOK, as_version=4), SCRIPT["notebook"]()
    told = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (found, made)]
    assert told[0] == told[1], "run `make tour`"
    outputs = [output for cell in found.cells if cell.cell_type == "code" for output in cell.outputs]
    assert all(output.output_type in ("execute_result", "display_data", "stream") for output in outputs)
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    counts = [cell.execution_count for cell in found.cells if cell.cell_type == "code"]
    assert counts == [*range(1, len(counts) + 1)]
    assert NOTEBOOK.stat().st_size < 150_000
    assert str(ROOT) not in NOTEBOOK.read_text("utf-8")
    assert tempfile.gettempdir() not in NOTEBOOK.read_text("utf-8")


@pytest.mark.slow
def test_notebook_runs() -> None:
    SCRIPT["run"](SCRIPT["notebook"]())
