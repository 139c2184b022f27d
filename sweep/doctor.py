"""`doctor`: what works here."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from kernels.jit import compile_cache
from sweep.configs import shared_workloads
from sweep.machine import available_bytes, default_workers
from sweep.provenance import package_versions
from sweep.quantity import human_size

Finding = tuple[bool, str]


def _packages() -> Finding:
    missing = [name for name in ("numba", "numpy", "pandas", "pyarrow", "duckdb") if importlib.util.find_spec(name) is None]
    text = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    return not missing, text if not missing else f"missing: {', '.join(missing)}; run make setup"


def _cache() -> Finding:
    path = compile_cache()
    return (
        path is not None,
        f"{path}" if path else "no folder that this user alone can write: every process compiles anew; set FAULTSWEEP_CACHE_DIR",
    )


def _ray() -> Finding:
    try:
        import ray
    except ImportError as error:
        return False, f"cannot be imported ({error}); use --executor local"
    return True, f"ray {ray.__version__}, token authentication is switched on by each run"


def _kvm() -> Finding:
    path = Path("/dev/kvm")
    if not path.exists():
        return True, "no /dev/kvm: simulation needs none"
    return True, "/dev/kvm " + ("usable" if os.access(path, os.R_OK | os.W_OK) else "there, but not for this user")


def _thp() -> Finding:
    folder = Path("/sys/kernel/mm/transparent_hugepage")
    if not folder.is_dir():
        return True, "this host has no transparent huge pages"
    values = {name: (folder / name).read_text().strip() for name in ("enabled", "use_zero_page") if (folder / name).exists()}
    return True, ", ".join(f"{name}: {value}" for name, value in values.items())


def _machine() -> Finding:
    return True, f"{default_workers()} CPUs, {human_size(available_bytes())} of memory free"


def _disk() -> Finding:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    return free > 1 << 30, f"{human_size(free)} free in {tempfile.gettempdir()}"


def _configs() -> Finding:
    names = shared_workloads()
    return bool(names), f"{len(names)} shared workloads" if names else "configs/workloads not found: reinstall"


def _validate() -> Finding:
    programs = {name: shutil.which(name) for name in ("cc", "qemu-system-x86_64", "apt-get")}
    missing = [name for name, path in programs.items() if path is None]
    text = "validate --boot can run" if not missing else f"validate --boot has no {', '.join(missing)}: see docs/validate.md"
    return True, text


CHECKS: dict[str, Callable[[], Finding]] = {
    "packages": _packages,
    "compile cache": _cache,
    "ray": _ray,
    "kvm": _kvm,
    "validate": _validate,
    "thp": _thp,
    "machine": _machine,
    "disk": _disk,
    "configs": _configs,
}


def examine() -> dict[str, Finding]:
    """Every check's finding: whether it is well, and a line about it."""
    return {name: check() for name, check in CHECKS.items()}
