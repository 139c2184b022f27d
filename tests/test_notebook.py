"""The notebook runs over any dataset, draws two figures without a network, and is committed without what it has drawn."""

import os
from copy import deepcopy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import sweep
from sweep.configs import config_root
from sweep.runner import RunOptions

EXAMPLES = config_root().parent / "examples"
NOTEBOOK = nbformat.read(EXAMPLES / "look.ipynb", as_version=4)
NO_PROXY = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # whoever asks for something gets nothing


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True], ids=["published", "small"])
def test_the_notebook_draws_two_figures(given: bool, study_file: Path, tmp_path: Path) -> None:
    environment = os.environ | NO_PROXY
    environment.pop("FAULTSWEEP_DATASET", None)
    if given:
        sweep.run(study_file, tmp_path / "data", RunOptions(executor="inline", quiet=True))
        environment["FAULTSWEEP_DATASET"] = str(tmp_path / "data")
    run = NotebookClient(deepcopy(NOTEBOOK), timeout=600, resources={"metadata": {"path": str(EXAMPLES)}}).execute(env=environment)
    outputs = [output for cell in run.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = [output.data["image/svg+xml"] for output in outputs if "image/svg+xml" in output.get("data", {})]
    assert len(figures) == 2
    for figure, marks in zip(figures, ("mark-symbol", "mark-line"), strict=True):
        assert marks in figure
        assert "http" not in figure.replace("http://www.w3.org/", "")
    assert not [output for output in outputs if output.output_type in ("error", "stream")]


def test_it_is_committed_without_outputs() -> None:
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count is not None]
