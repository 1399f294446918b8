"""The notebook runs from beginning to end, and the code of docs/python.md does."""

import json
import re
from pathlib import Path

import pytest

from tests.tiny_run import ROOT

pytestmark = pytest.mark.slow
NOTEBOOK, PAGE = ROOT / "docs" / "notebook.ipynb", ROOT / "docs" / "python.md"


def test_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From docs/, where Jupyter starts it."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv("STEPS", "4")
    monkeypatch.setenv("OUT", str(tmp_path))
    NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    assert json.loads((tmp_path / "mpl_4_steps" / "summary.json").read_text())["steps"] == 4
    kinds = [kind for cell in code for output in cell.outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") == 2  # the curve and the predictions
    assert (tmp_path / "report.html").exists() == (ROOT / "tools" / "report.py").exists()


def test_the_code_of_the_page(
    tiny_rec: Path, tiny_trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, place in (("REC", tiny_rec), ("RUN", tiny_trained), ("configs", ROOT / "configs")):
        Path(name).symlink_to(place)
    digits = sorted((tiny_rec.parent / "images" / "val").glob("*/*.jpg"))
    Path("photos").mkdir()
    for name, digit in zip(("a.jpg", "b.jpg", "photos/c.jpg"), digits, strict=False):
        Path(name).write_bytes(digit.read_bytes())
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace('"steps": 300', '"steps": 2'), names)
    assert names["features"].shape == (1, 64)  # type: ignore[attr-defined]
    assert names["steps"] == (4, 6)
    assert Path("exported/model.safetensors").exists()
