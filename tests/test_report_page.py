"""The page: which sections it has, that names stay names, that it is the same each time and small."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import sweep
from sweep.dataset.store import Store
from sweep.errors import DatasetError
from sweep.report.build import Report, build_report
from sweep.report.compare import compare
from sweep.report.page import Page, columns, embedded, policy, render, short
from sweep.report.sections import SECTIONS, Drawn
from sweep.report.tables import ReportTable
from tests import fabricate

HOSTILE = (
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(2)</script>",
    "<!--<script>",
    "' onmouseover='alert(3)",
    "\u2028{{7*7}}",
)
MOST_BYTES = 2_000_000


class Elements(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: dict[str, list[str]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.tags[-1][0] if self.tags else "", []).append(data)

    def data(self) -> list[dict[str, Any]]:
        """What the page's script reads."""
        texts = re.findall(r'<script type="application/json" id="data">(.*?)</script>', self.rawdata_all, re.S)
        found: list[dict[str, Any]] = json.loads(texts[0])
        return found

    def feed(self, data: str) -> None:
        self.rawdata_all = data
        super().feed(data)


def page_of(place: Path) -> Elements:
    return Elements(build_report(place).path.read_text())


def sections_of(elements: Elements) -> list[str | None]:
    return [attributes.get("id") for tag, attributes in elements.tags if tag == "section"]


@pytest.fixture(scope="module")
def thread(thread_report: Report) -> Elements:
    return Elements(thread_report.path.read_text())


def run(text: str, folder: Path, **options: Any) -> Path:
    study = folder / "study.toml"
    study.write_text(text)
    sweep.run(study, folder / "data", sweep.RunOptions(executor="inline", quiet=True, **options))
    return folder / "data"


# --- which sections


def test_every_section_has_a_key_of_its_own() -> None:
    keys = [section.key for section in SECTIONS]
    assert len(keys) == len(set(keys))
    assert all(re.fullmatch(r"[a-z0-9_-]+", key) for key in keys)


def test_the_thread_has_all_that_it_has_data_for(thread: Elements) -> None:
    assert sections_of(thread) == [
        "answers",
        "configurations",
        "along-vcpus",
        "along-cores",
        "latency",
        "time",
        "memory",
        "scaling",
        "claims",
        "break-even",
        "provenance",
    ]


def test_one_point_has_no_comparisons(tmp_path: Path) -> None:
    place = run('[study]\nname = "one"\n[point]\nmemory = "4MiB"\n', tmp_path)
    assert sections_of(page_of(place)) == ["configurations", "latency", "time", "provenance"]


def test_one_axis_and_nothing_to_choose(tmp_path: Path) -> None:
    place = run('[study]\nname = "axis"\n[point]\nmemory = "4MiB"\n[[block]]\ngrid = { vcpus = [1, 2, 4] }\n', tmp_path)
    assert sections_of(page_of(place)) == ["configurations", "along-vcpus", "latency", "time", "memory", "scaling", "provenance"]


def test_what_failed_and_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("vcpu,gfn,write\n0,0,1\n")
    text = """
[study]
name = "partly"
[point]
memory = "4MiB"
[[block]]
grid = { workload = ["fine", "gone"], vcpus = [1, 2] }
[workload.fine]
steps = [{ op = "touch" }]
[workload.gone]
steps = [{ op = "touch_list", path = "t.csv" }]
"""
    study = tmp_path / "study.toml"
    study.write_text(text)
    loaded = sweep.load_study(study)
    (tmp_path / "t.csv").write_text("vcpu,gfn,write\n9,0,1\n")  # no vCPU 9: these points fail
    sweep.run(loaded, tmp_path / "data", sweep.RunOptions(executor="inline", quiet=True))
    elements = page_of(tmp_path / "data")
    assert "failed" in sections_of(elements)
    assert any("2 of 4 points are there; 2 failed" in word for word in elements.words["p"])


def test_a_dataset_without_points_is_an_error(study_file: Path, tmp_path: Path) -> None:
    sweep.run(study_file, tmp_path / "x", sweep.RunOptions(executor="inline", quiet=True, limit=1))
    for folder in ("points", "commits"):
        for path in (tmp_path / "x" / folder).iterdir():
            path.unlink()
    (tmp_path / "x" / "sealed.json").unlink(missing_ok=True)
    with pytest.raises(DatasetError, match="holds no points yet; run the study first"):
        build_report(tmp_path / "x")


def test_where_every_point_failed_the_error_says_so(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        '[study]\nname = "lost"\n[point]\nmemory = "4MiB"\nworkload = "gone"\n'
        '[workload.gone]\nsteps = [{ op = "touch_list", path = "t.csv" }]\n[[block]]\ngrid = { kernel = ["6.1", "6.12"] }\n'
    )
    (tmp_path / "t.csv").write_text("vcpu,gfn,write\n0,0,1\n")
    loaded = sweep.load_study(study)
    (tmp_path / "t.csv").write_text("vcpu,gfn,write\n9,0,1\n")  # no vCPU 9
    sweep.run(loaded, tmp_path / "data", sweep.RunOptions(executor="inline", quiet=True))
    told = "no point has a result, 2 failed; faultsweep query .* 'from errors' says why"
    with pytest.raises(DatasetError, match=told):
        build_report(tmp_path / "data")
    with pytest.raises(DatasetError, match=told):
        compare(tmp_path / "data", tmp_path / "data")


def test_the_page_can_lie_elsewhere(study_file: Path, tmp_path: Path) -> None:
    """A dataset that others own is only read."""
    sweep.run(study_file, tmp_path / "x", sweep.RunOptions(executor="inline", quiet=True))
    there = sorted((tmp_path / "x").rglob("*"))
    pages = tmp_path / "pages" / "x.html", tmp_path / "pages" / "both.html"
    assert build_report(tmp_path / "x", pages[0]).path == pages[0]
    assert compare(tmp_path / "x", tmp_path / "x", pages[1]).path == pages[1]
    assert sorted((tmp_path / "x").rglob("*")) == there
    assert pages[0].read_bytes() == build_report(tmp_path / "x").path.read_bytes()
    assert pages[1].read_bytes() == compare(tmp_path / "x", tmp_path / "x").path.read_bytes()


# --- names stay names


def test_hostile_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    columns = {"workload": HOSTILE, "costs": HOSTILE[::-1], "kernel": [*HOSTILE, "6.5"], "backing": HOSTILE[:2], "vcpus": [1, 2]}
    place = fabricate.dataset(tmp_path, 60, columns)
    store = Store(place)
    record = store.json("study.json")
    record["study"]["title"] = " ".join(HOSTILE)
    store.write_json("study.json", record)
    (place / "study.toml").write_text(f"# Question: {HOSTILE[0]} {HOSTILE[1]}?\n")
    elements = page_of(place)
    assert not {"img", "object", "iframe", "link", "a"} & {
        tag for tag, attributes in elements.tags if not (attributes.get("href") or "").startswith("#")
    }
    assert sum(tag == "script" for tag, _ in elements.tags) == 3
    assert not [name for _, attributes in elements.tags for name in attributes if name.startswith("on")]
    assert "".join(elements.words["h1"]).strip() == " ".join(HOSTILE)
    tables = [entry for entry in elements.data() if "views" not in entry]
    texts = {word for entry in tables for column in entry["columns"] for word in column.get("words", column.get("values"))}
    assert set(HOSTILE) <= texts


def test_a_template_in_a_name_is_not_filled_in(tmp_path: Path) -> None:
    table = ReportTable("{{ 7 * 7 }}", pd.DataFrame({"{{ 6 * 7 }}": ["{% raw %}"]}))
    text = render(Page("{{ 1 }}", "s", "", "a", (), (), [Drawn("k", "t", [table])])).decode()
    assert "{{ 7 * 7 }}" in text and "{{ 6 * 7 }}" in text and "{% raw %}" in text


def test_data_can_end_no_script_element() -> None:
    text = embedded({"a": "</script><!-- & \u2028"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": "</script><!-- & \u2028"}


def test_the_policy_lets_nothing_run_but_the_pages_own_scripts(thread: Elements) -> None:
    metas = [attributes for tag, attributes in thread.tags if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"]
    text = str(metas[0]["content"])
    assert text.startswith("default-src 'none'; script-src 'sha256-")
    assert not re.search(r"unsafe|http|\*|data:|blob:", text)
    scripts = re.findall(r"<script>(.*?)</script>", thread.rawdata_all, re.S)
    assert policy(scripts, re.findall(r"<style>(.*?)</style>", thread.rawdata_all, re.S)) == text


def test_nothing_on_the_page_points_outside(thread: Elements) -> None:
    for _, attributes in thread.tags:
        for name in ("src", "href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith("#")


# --- the same each time, and small


def test_the_same_data_give_the_same_bytes(study_file: Path, tmp_path: Path) -> None:
    """From runs at other times, on another number of workers, into other folders."""
    for name, executor in (("x", "inline"), ("y", "local")):
        sweep.run(study_file, tmp_path / name, sweep.RunOptions(executor=executor, workers=2, quiet=True))
    assert build_report(tmp_path / "x").path.read_bytes() == build_report(tmp_path / "y").path.read_bytes()


GRID = {
    "vcpus": [1, 2, 4, 8, 16],
    "backing": ["anonymous"] * 5 + ["anonymous_thp"] * 5 + ["shmem"] * 5,
    "memory_bytes": [(1 + n // 15) << 30 for n in range(10_000)],
}
EVERYTHING_ONCE = {
    "thp_failure": np.linspace(0, 1, 10_000).tolist(),
    "memory_bytes": [4096 * (1 + n * 7919 % 10_000) for n in range(10_000)],
    "offset_bytes": [4096 * (n * 104_729 % 10_000) for n in range(10_000)],
    "vcpus": [1 + n % 4096 for n in range(10_000)],
    "cores": [1 + 17 * n % 4096 for n in range(10_000)],
    "prealloc_threads": [1 + 13 * n % 4096 for n in range(10_000)],
    "workload": [f"workload-{n}" for n in range(10_000)],
    "backing": ["anonymous", "anonymous_thp", "shmem"],
}


@pytest.mark.parametrize(("columns", "shown"), [(GRID, 10_000), (EVERYTHING_ONCE, 5_000)], ids=["grid", "everything once"])
def test_ten_thousand_points_fit_into_two_megabytes(tmp_path: Path, columns: dict[str, list[Any]], shown: int) -> None:
    place = fabricate.dataset(tmp_path, 10_000, columns)
    report = build_report(place)
    assert report.path.stat().st_size < MOST_BYTES
    table = Elements(report.path.read_text()).data()[0]
    assert table["rows"] >= shown


def test_more_points_are_sampled_and_the_page_says_so(tmp_path: Path) -> None:
    place = fabricate.dataset(tmp_path, 30_000, GRID | {"memory_bytes": [(1 + n // 15) << 20 for n in range(30_000)]})
    elements = page_of(place)
    assert len(elements.rawdata_all.encode()) < MOST_BYTES
    assert elements.data()[0]["rows"] == 10_000
    assert any("30,000 points: the table of configurations has an even sample" in word for word in elements.words["p"])


def test_numbers_are_short_and_words_stand_once() -> None:
    assert [short(value) for value in (1.0, 123456.789, 0.000123456, True, float("nan"), float("inf"))] == [
        1,
        123460,
        0.00012346,
        1,
        None,
        None,
    ]
    frame = pd.DataFrame({"kernel": ["6.5", "6.5", "6.10", "6.5"], "exits": ["1,000", "2", "3 (4x)", "5GiB"], "y": [1.0, 2.0, 3.0, 4.0]})
    assert columns(frame) == [
        {"name": "kernel", "kind": "text", "words": ["6.5", "6.10"], "codes": [0, 0, 1, 0]},
        {"name": "exits", "kind": "number", "values": ["1,000", "2", "3 (4x)", "5GiB"]},
        {"name": "y", "kind": "number", "values": [1, 2, 3, 4]},
    ]


def test_tables_are_tables_without_scripts_too(thread: Elements) -> None:
    captions = sum(tag == "caption" for tag, _ in thread.tags)
    assert captions == sum(tag == "table" for tag, _ in thread.tags) > 5
    assert all(attributes.get("scope") == "col" for tag, attributes in thread.tags if tag == "th")
    assert "216,608 (9.02x)" in thread.words["td"]


def test_every_chart_says_what_it_is(thread: Elements) -> None:
    figures = [attributes for tag, attributes in thread.tags if tag == "figure"]
    assert len(figures) == sum(tag == "figcaption" for tag, _ in thread.tags) > 5
    assert all(attributes["data-title"] for attributes in figures)
