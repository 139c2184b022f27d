"""Who made a dataset, when, with what: one file per run beside the data, never inside it."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from kernels.jit import model_digest

PACKAGES = ("faultsweep", "numba", "llvmlite", "numpy", "scipy", "pandas", "pyarrow", "ray", "duckdb", "obstore")
ENVIRONMENT = (  # what can change how a run goes; nothing that holds a secret
    "CI",
    "FAULTSWEEP_CACHE_DIR",
    "NUMBA_DISABLE_JIT",
    "OMP_NUM_THREADS",
    "RAY_AUTH_MODE",
    "RAY_task_oom_retries",
    "RAY_worker_niceness",
    "SLURM_ARRAY_TASK_ID",
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "TZ",
)
THP = Path("/sys/kernel/mm/transparent_hugepage")


def package_versions() -> dict[str, str]:
    """Installed versions of what can change a result; packages that are missing are left out."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def git_state(folder: Path) -> dict[str, Any]:
    """Commit and dirtiness of the checkout the code runs from; empty outside of one."""
    try:
        commit = subprocess.run(["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(["git", "-C", folder, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def cpu_model() -> str:
    """As /proc/cpuinfo names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def thp_state() -> dict[str, str]:
    """The host's settings of transparent huge pages: they change how fast a run is."""
    return {name: (THP / name).read_text().strip() for name in ("enabled", "defrag", "use_zero_page") if (THP / name).is_file()}


def lock_digest() -> str:
    """SHA-256 of requirements.lock; '' outside of a checkout."""
    path = Path(__file__).resolve().parents[1] / "requirements.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def provenance(command: list[str]) -> dict[str, Any]:
    """What a run writes down about itself. Of the environment, the names of ENVIRONMENT alone: others may hold secrets."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [Path(command[0]).name, *command[1:]] if command else [],
        "python": sys.version.split()[0],
        "packages": package_versions(),
        "lock_digest": lock_digest(),
        "model_digest": model_digest(),
        "git": git_state(Path(__file__).resolve().parent),
        "host": platform.node(),
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "thp": thp_state(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }
