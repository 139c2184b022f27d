"""The packages are our own, and say so when they are not; the wheel holds the configs; the lock is complete."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from sweep.configs import config_root

ROOT = config_root().parent


def test_a_foreign_package_of_the_same_name_is_named_with_the_cure(tmp_path: Path) -> None:
    foreign = tmp_path / "kernels"
    foreign.mkdir()
    (foreign / "__init__.py").write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import sweep"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"foreign package 'kernels' at {tmp_path}" in done.stderr
    assert "uninstall that one" in done.stderr


def test_the_wheel_holds_both_packages_and_the_configs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {
        "kernels/engine.py",
        "sweep/cli.py",
        "sweep/configs/costs/default.toml",
        "sweep/configs/studies/thread.toml",
        "sweep/host/litmus.c",
    } <= set(names)
    assert {f"sweep/report/page.{kind}" for kind in ("html.jinja", "css", "js")} <= set(names)
    assert not [name for name in names if name.startswith("tests/")]


def test_the_lock_pins_every_dependency_with_hashes_and_names_no_index() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    pinned = {name.lower().replace("_", "-") for name in re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.M)}
    wanted = re.findall(r'^  "([A-Za-z0-9_-]+)>=', (ROOT / "pyproject.toml").read_text(), re.M)
    assert {name.lower() for name in wanted} <= pinned
    for entry in re.split(r"\n(?=\S)", lock.strip()):
        assert entry.startswith("#") or "--hash=sha256:" in entry, entry.splitlines()[0]
    assert "://" not in lock
