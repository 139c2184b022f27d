"""Who made a dataset, when, with what: one file per run beside the data, never inside it."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kernels.jit import model_digest

PACKAGES = ("faultsweep", "numba", "numpy", "pandas", "pyarrow", "ray", "duckdb")


def package_versions() -> dict[str, str]:
    """Installed versions of what can change a result; packages that are missing are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirtiness of the checkout the code runs from; empty outside of one."""
    try:
        commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(["git", "-C", folder, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def provenance(command: list[str]) -> dict[str, Any]:
    """What a run writes down about itself. No environment variables: they may hold secrets."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(command[0]).name, *command[1:]] if command else [],
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "model_digest": model_digest(),
        "git": git_state(Path(__file__).resolve().parent),
        "machine": platform.machine(),
        "kernel": platform.release(),
        "cpus": len(os.sched_getaffinity(0)),
    }
