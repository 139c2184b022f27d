"""The model against real kernels: this machine's, and those that QEMU boots. What cannot run here is skipped, and says why."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sweep.host.boot import BOOT_VERSIONS
from sweep.host.case import Case, predict
from sweep.host.compare import Verdict
from sweep.host.result import LayerResult, read_dataset
from sweep.host.validate import Detail, ValidateOptions, Validation, validate

FEW = "^(anonymous|thp|shmem|memfd)/host_(read_then_write|first|fork|dontneed_one|populated)$"
PLENTY = 600  # seconds: the machine may be busy


def cli(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "sweep", "validate", *arguments], capture_output=True, text=True, check=False, timeout=900)


def all_exact(found: Validation, record: Callable[[str, object], None], least: int) -> LayerResult:
    """The only layer, with every case exact; skipped with its reason if it cannot run here."""
    layer = found.layers[0]
    name = f"validate: {layer.layer} {layer.kernel} {layer.mmu}"
    if layer.skipped:
        pytest.skip(f"{name}: {layer.skipped}")
    assert found.exit_status == 0, found.as_text(Detail.DIFFERENCES)
    exact = layer.count(Verdict.EQUAL)
    if exact < least:
        pytest.skip(f"{name}: only {exact} cases could run: {found.as_text(Detail.DIFFERENCES)[-300:]}")
    record(f"{name} ({layer.host['release']}), cases exact", exact)
    return layer


@pytest.mark.slow
@pytest.mark.parametrize("kernel", BOOT_VERSIONS)
def test_a_booted_kernel_counts_what_the_model_predicts(kernel: str, record_property: Callable[[str, object], None]) -> None:
    """The short form: 20 cases on KVM's own TDP MMU."""
    found = validate(ValidateOptions(layers=["boot"], boot=[kernel], seconds=PLENTY))
    layer = all_exact(found, record_property, 20)
    assert layer.host["release"].startswith(kernel)
    assert layer.host["tdp_mmu"] == "Y"
    assert sum(row.verdict == Verdict.EQUAL for result in layer.results for row in result.rows) > 1000


def test_the_memory_of_this_machine(record_property: Callable[[str, object], None]) -> None:
    all_exact(validate(ValidateOptions(layers=["memory"], only=FEW, seconds=PLENTY)), record_property, 8)


def test_kvm_of_this_machine(record_property: Callable[[str, object], None]) -> None:
    all_exact(validate(ValidateOptions(layers=["kvm"], only="^(anonymous|thp)/", seconds=PLENTY)), record_property, 8)


def test_a_wrong_prediction_is_found_on_this_machine() -> None:
    def wrong(case: Case) -> list[dict[str, int]]:
        return [step | {"vmm_pgfault": step["vmm_pgfault"] + 1} for step in predict(case)]

    found = validate(ValidateOptions(layers=["memory"], only="^anonymous/host_write$", seconds=PLENTY), wrong)
    if found.layers[0].skipped:
        pytest.skip(f"validate: {found.layers[0].skipped}")
    assert found.exit_status == 1
    assert [row.counter for row in found.layers[0].results[0].wrong] == ["vmm_pgfault"]


def test_random_cases_on_this_machine(record_property: Callable[[str, object], None]) -> None:
    options = ValidateOptions(layers=["memory"], random=15, seed=1, only="", seconds=PLENTY)
    all_exact(validate(options), record_property, 1)


def test_the_command_prints_layers_and_writes_a_dataset(tmp_path: Path) -> None:
    out = tmp_path / "data"
    done = cli("--layer", "memory", "--layer", "boot", "--only", "^anonymous/host_write$", "--out", str(out), "-v")
    assert done.returncode in (0, 5), done.stderr
    assert "boot: skipped: no kernel was named; --boot 6.12 fetches and boots one" in done.stdout
    hosts = json.loads((out / "hosts.json").read_text())
    assert [host["layer"] for host in hosts] == ["memory", "boot"]
    assert hosts[0]["about"]["model_digest"]
    if not hosts[0]["skipped"]:
        assert "step 0 host_touch vmm_pgfault real 1024 predicted 1024 equal" in " ".join(done.stdout.split())
        assert read_dataset(out).tables["cases"]["verdict"].to_pylist() == ["equal"]
    shown = cli("--show", str(out))
    assert (shown.returncode, shown.stdout.splitlines()[0][:10]) == (0, "| kernel |")


def test_a_kernel_that_nobody_packages_ends_with_5_and_says_so() -> None:
    done = cli("--layer", "boot", "--boot", "5.0", "--seconds", "5")
    assert done.returncode == 5
    assert "boot 5.0 tdp: skipped: " in done.stdout
    assert "Traceback" not in done.stderr


def test_an_image_that_is_no_kernel_ends_with_5(tmp_path: Path) -> None:
    image = tmp_path / "vmlinuz"
    image.write_bytes(b"no kernel" * 1000)
    done = cli("--layer", "boot", "--kernel-image", str(image), "--seconds", "5")
    assert done.returncode == 5
    assert "skipped: " in done.stdout
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--layer", "cloud"], ["--boot", "../x"], ["--memory", "2G"], ["--show", "/nowhere"], ["--seconds", "0"]]
)
def test_bad_arguments_are_one_line(arguments: list[str]) -> None:
    done = cli(*arguments)
    assert done.returncode in (2, 3)
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stdout == ""
