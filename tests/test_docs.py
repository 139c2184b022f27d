"""Documents that are generated are up to date; what the README shows can be run; nothing of this project names a machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.policy import Behaviour
from sweep.configs import config_root, shared_workloads
from sweep.pages import PAGES
from sweep.plan import Plan
from sweep.study import load_study
from tests.bench.instead import WAYS, gives_table

ROOT = config_root().parent
STUDIES = sorted((config_root() / "studies").glob("*.toml"))


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name](), "python -m sweep.pages"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_shipped_study_is_valid_and_begins_with_its_question(path: Path) -> None:
    assert path.read_text().startswith("# Question:")
    assert Plan(load_study(path)).points()


@pytest.mark.parametrize("name", shared_workloads())
def test_a_shared_workload_is_valid(name: str) -> None:
    from sweep.configs import load_workload

    workload, faults = load_workload(name)
    assert not faults
    assert workload is not None


def test_model_page_names_every_behaviour() -> None:
    text = (ROOT / "docs" / "model.md").read_text()
    assert not [b.name for b in Behaviour if f"`{b.name}`" not in text]


def test_the_site_builds_and_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    """--strict: each page stands in the navigation, each link and anchor leads somewhere."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and a page for what is not found
    for page in pages:
        assert not re.findall(r"""(?:src=|<link[^>]*href=|url\()["']?(?:https?:)?//[^"' >]*""", page.read_text()), page


def test_comparison_page_has_every_way_and_what_it_gives() -> None:
    """Its figures are of one machine; all else is what the benchmark would write."""
    text = (ROOT / "docs" / "compare.md").read_text()
    assert gives_table() in text, "python -m tests.bench.instead --write"
    speeds = text.split("What each gives")[0]
    assert not [way.name for way in WAYS if f"| {way.name} |" not in speeds]


def test_readme_is_short_and_its_commands_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)\b", text)) <= targets


def test_nothing_names_a_machine_or_a_package_index() -> None:
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a checkout")
    home = str(ROOT.parent) + "/"
    for name in filter(None, tracked.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in {".parquet", ".png", ".gz"} or not path.is_file():
            continue
        text = path.read_text("utf-8")
        assert home not in text or len(home) < 4, name
        assert "-".join(("index", "url")) not in text, name
