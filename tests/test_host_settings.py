"""Settings of the host: none is touched unasked, and every one is put back, also when the process is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sweep.configs import config_root
from sweep.errors import EnvironmentProblemError
from sweep.host.guardian import restore
from sweep.host.settings import THP, Settings, changed_settings, read_setting, settings_of, why_not
from sweep.host.suite import suite

ROOT = config_root().parent
FILES = {
    f"{THP}/enabled": "always [madvise] never",
    f"{THP}/use_zero_page": "1",
    f"{THP}/shmem_enabled": "always within_size advise [never] deny force",
    "/proc/sys/vm/nr_hugepages": "0",
    "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "0",
}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A tree like that of a host; files keep what is written, as sysfs does but for the list of choices."""
    for name, text in FILES.items():
        path = tmp_path / "host" / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path / "host"


def state(host: Path) -> dict[str, str]:
    return {name: read_setting(host / name.lstrip("/")) for name in FILES}


def test_what_a_case_needs_is_what_its_point_says() -> None:
    cases = {case.name: settings_of(case) for case in suite("6.12")}
    assert cases["thp_no_zero_page/write"] == {f"{THP}/enabled": "madvise", f"{THP}/use_zero_page": "0"}
    assert cases["shmem_thp/write"] == {f"{THP}/shmem_enabled": "advise"}
    assert cases["anonymous/write"] == {}


def test_unasked_nothing_is_changed_and_the_case_is_left_out_with_the_cure(host: Path) -> None:
    before = state(host)
    case = next(case for case in suite("6.12") if case.name == "thp_no_zero_page/write")
    reason = why_not(Settings(host), case)
    assert reason == "use_zero_page is 1, 0 is needed (--change-settings, as root, sets it and puts it back)"
    assert state(host) == before


def test_asked_settings_are_changed_and_put_back(host: Path, tmp_path: Path) -> None:
    before = state(host)
    with changed_settings(tmp_path / "cache", True, host) as settings:
        assert settings.lacking({f"{THP}/use_zero_page": "0", f"{THP}/enabled": "never"}) == []
        assert read_setting(host / THP.lstrip("/") / "enabled") == "never"
        assert settings.lacking({f"{THP}/enabled": "always"}) == []
    assert state(host) == before
    assert not (tmp_path / "cache" / "settings.json").exists()


def test_they_are_put_back_after_an_exception(host: Path, tmp_path: Path) -> None:
    before = state(host)
    with pytest.raises(RuntimeError, match="in between"), changed_settings(tmp_path / "cache", True, host) as settings:
        settings.lacking({f"{THP}/use_zero_page": "0"})
        raise RuntimeError("in between")
    assert state(host) == before


CHANGE_AND_WAIT = """
import signal, sys, time
from pathlib import Path
from sweep.host.settings import THP, changed_settings
for number in (signal.SIGHUP, signal.SIGINT):  # the shell or nohup that started the tests may have them ignored
    signal.signal(number, signal.SIG_DFL)
with changed_settings(Path(sys.argv[2]), True, Path(sys.argv[1])) as settings:
    settings.lacking({f"{THP}/use_zero_page": "0", f"{THP}/enabled": "never"})
    print("changed", flush=True)
    time.sleep(600)
"""


def start_changer(host: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHANGE_AND_WAIT, str(host), str(cache)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    assert process.stdout
    assert process.stdout.readline() == "changed\n"
    return process


def wait_for(condition: object) -> None:
    """Poll until it holds; the deadline only ends a test that would hang."""
    for _ in range(600):
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.05)
    pytest.fail("it did not happen within 30 s")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name)
def test_they_are_put_back_when_the_process_is_killed(host: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = state(host)
    process = start_changer(host, tmp_path / "cache")
    assert state(host) != before
    os.killpg(process.pid, number)  # the whole group, as a terminal or a job manager does
    process.wait()
    wait_for(lambda: state(host) == before and not (tmp_path / "cache" / "settings.json").exists())


def test_what_even_the_keeper_could_not_put_back_the_next_run_does(host: Path, tmp_path: Path) -> None:
    """The machine lost power: values are changed, the journal is there, and nobody lives."""
    before = state(host)
    cache = tmp_path / "cache"
    cache.mkdir()
    path = host / THP.lstrip("/") / "use_zero_page"
    (cache / "settings.json").write_text(json.dumps({str(path): "1"}))
    path.write_text("0")
    with changed_settings(cache, True, host):
        assert state(host) == before


def test_two_processes_do_not_change_settings_at_once(host: Path, tmp_path: Path) -> None:
    process = start_changer(host, tmp_path / "cache")
    with pytest.raises(EnvironmentProblemError, match="another faultsweep validate"), changed_settings(tmp_path / "cache", True, host):
        pass
    process.kill()
    process.wait()


def test_a_setting_that_cannot_be_put_back_stays_in_the_journal(tmp_path: Path) -> None:
    journal = tmp_path / "settings.json"
    good = tmp_path / "good"
    good.write_text("0")
    journal.write_text(json.dumps({str(tmp_path / "none" / "gone"): "1", str(good): "1"}))
    assert len(restore(journal)) == 1
    assert good.read_text() == "1"
    assert list(json.loads(journal.read_text())) == [str(tmp_path / "none" / "gone")]


def test_a_kernel_that_refuses_a_value_leaves_the_case_out(host: Path, tmp_path: Path) -> None:
    before = state(host)
    with changed_settings(tmp_path / "cache", True, host) as settings:
        assert "cannot be set" in settings.lacking({f"{THP}/no_such_file": "1"})[0]
        assert "2 MiB pages" in settings.lacks_hugetlb()
    assert state(host) == before
