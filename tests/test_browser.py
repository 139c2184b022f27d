"""The report in a real browser, from disk: Debian's Chromium (`make test` installs it where it can; else these tests are skipped)."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import sweep
from sweep.report.build import Report, build_report
from sweep.report.compare import compare
from tests import fabricate
from tests.test_report_page import HOSTILE

PATH = shutil.which("chromium") or shutil.which("chromium-browser")
WHY = "no Chromium here, so the report was opened in no browser (Debian: apt-get install chromium)"
pytestmark = pytest.mark.skipif(PATH is None, reason=WHY)
WINDOW, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page, and what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def draw_all(self) -> int:
        """Scroll to each chart and wait until it is drawn; returns how many there are."""
        charts = self.page.locator("figure.chart")
        for place in range(charts.count()):
            charts.nth(place).scroll_into_view_if_needed()
            self.page.locator("figure.chart[data-drawn]").nth(place).wait_for()
        return int(charts.count())

    def cells(self, section: str, column: str) -> list[str]:
        """The cells of a column of the section's first table."""
        heads = [text.strip() for text in self.page.locator(f"#{section} table").first.locator("th").all_inner_texts()]
        number = heads.index(column) + 1
        return list(self.page.locator(f"#{section} table").first.locator(f"tbody tr td:nth-child({number})").all_inner_texts())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=PATH, args=arguments)
        yield running
        running.close()


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """window(file, **options of the window): the file opened in a new window."""
    contexts = []

    def opened(path: Path, **options: Any) -> Opened:
        contexts.append(browser.new_context(**{"viewport": WINDOW, **options}))
        page = contexts[-1].new_page()
        found = Opened(page)
        page.on("console", lambda message: found.said.append(message.text))
        page.on("pageerror", lambda error: found.said.append(str(error)))
        page.on("dialog", lambda dialog: (found.said.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: found.asked.append(request.url))
        page.goto(path.as_uri())
        return found

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a small study: two backings, three kernels, 1 ... 4 vCPUs, two replicates."""
    folder = tmp_path_factory.mktemp("small")
    study = folder / "small.toml"
    study.write_text("""
[study]
name = "small"
title = "Small"
replicates = 2
[point]
memory = "4MiB"
[[block]]
grid = { kernel = ["6.1", "6.5", "6.13"], backing = ["anonymous", "anonymous_thp"], vcpus = [1, 2, 4] }
""")
    sweep.run(study, folder / "data", sweep.RunOptions(executor="inline", quiet=True))
    return build_report(folder / "data").path


def test_the_thread_opens_from_disk_without_a_word_or_a_request(window: Any, thread_report: Report) -> None:
    opened = window(thread_report.path)
    assert opened.draw_all() >= 7
    assert opened.page.locator("figure.chart svg").count() >= 7
    assert opened.said == []
    assert opened.asked == [thread_report.path.as_uri()]


def test_a_click_on_a_head_sorts_and_another_turns_the_order_round(window: Any, small: Path) -> None:
    opened = window(small)
    head = opened.page.locator("#configurations th", has_text="total ms")
    head.locator("button").click()
    up = [float(text.replace(",", "")) for text in opened.cells("configurations", "total ms")]
    assert up == sorted(up) and len(set(up)) > 3
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").press("Enter")
    down = [float(text.replace(",", "")) for text in opened.cells("configurations", "total ms")]
    assert down == sorted(down, reverse=True)
    opened.page.locator("#configurations th", has_text="kernel").locator("button").click()
    assert list(dict.fromkeys(opened.cells("configurations", "kernel"))) == ["6.1", "6.5", "6.13"]
    assert head.get_attribute("aria-sort") is None


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("", 18),
        ("6.13", 6),
        ("kernel=6.1", 6),
        ("kernel>=6.5 vcpus>1", 8),
        ("THP", 9),
        ("backing=anonymous vcpus<=2", 6),
        ("memory_bytes", 0),
        ("nothing", 0),
    ],
)
def test_the_filter_keeps_rows_that_have_every_word(window: Any, small: Path, text: str, rows: int) -> None:
    opened = window(small)
    opened.page.locator("#configurations input").fill(text)
    assert opened.page.locator("#configurations tbody tr").count() == rows
    assert opened.page.locator("#configurations [role=status]").inner_text().startswith(f"{rows} of {rows} rows")


def test_a_long_table_grows_when_asked(window: Any, thread_report: Report) -> None:
    opened = window(thread_report.path)
    rows = opened.page.locator("#configurations tbody tr")
    assert rows.count() == 100
    opened.page.locator("#configurations button", has_text="more rows").click()
    assert rows.count() == 1000


def test_a_point_tells_its_figures_when_the_mouse_is_over_it(window: Any, small: Path) -> None:
    opened = window(small)
    opened.draw_all()
    figure = opened.page.locator("#along-vcpus figure")
    figure.scroll_into_view_if_needed()
    box = figure.locator("path[aria-roledescription=point]").last.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tip = opened.page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert "setting" in tip.inner_text() and "anonymous" in tip.inner_text()
    assert opened.said == []


def test_a_chart_shows_the_conditions_and_the_view_that_are_chosen(window: Any, small: Path) -> None:
    opened = window(small)
    opened.draw_all()
    figure = opened.page.locator("#along-vcpus figure")
    assert "kernel 6.1" in figure.locator(".drawing").get_attribute("aria-label")
    figure.locator("select").first.select_option(label="kernel 6.13")
    figure.locator(".drawing[aria-label*='kernel 6.13']").wait_for()
    figure.locator("select").last.select_option(label="time")
    figure.locator("svg >> text=time, ms").wait_for()
    assert opened.said == []


def test_a_chart_is_a_table_too(window: Any, small: Path) -> None:
    opened = window(small)
    opened.draw_all()
    figure = opened.page.locator("#time figure")
    figure.locator("summary").click()
    assert {"label", "part", "x", "share"} <= set(figure.locator("details th").all_inner_texts())
    assert figure.locator("details tbody tr").count() > 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(window: Any, small: Path, scheme: str) -> None:
    opened = window(small, color_scheme=scheme)
    opened.draw_all()
    ground, ink, label = opened.page.evaluate(
        """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector("h1")).color,
                  getComputedStyle(document.querySelector("figure svg text")).fill]"""
    )
    assert (brightness(ground) < 64) == (scheme == "dark")
    assert abs(brightness(ground) - brightness(ink)) > 150
    assert abs(brightness(ground) - brightness(label)) > 150


def brightness(colour: str) -> float:
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return 0.3 * red + 0.6 * green + 0.1 * blue


@pytest.mark.parametrize("which", ["thread", "small"])
def test_a_phone_shows_it_without_sideways_scrolling(window: Any, small: Path, thread_report: Report, which: str) -> None:
    opened = window(small if which == "small" else thread_report.path, viewport=PHONE)
    opened.draw_all()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    widths = opened.page.evaluate("[...document.querySelectorAll('figure svg.marks')].map((e) => e.getBoundingClientRect().right)")
    assert max(widths) <= PHONE["width"]
    assert opened.said == []


def test_hostile_names_run_nothing(window: Any, tmp_path: Path) -> None:
    columns = {
        "workload": HOSTILE,
        "costs": HOSTILE[::-1],
        "kernel": [*HOSTILE, "6.5"],
        "backing": HOSTILE[:2],
        "vcpus": [1] * 7 + [2] * 7 + [4] * 7,
    }
    opened = window(build_report(fabricate.dataset(tmp_path, 420, columns)).path)
    assert opened.draw_all() >= 4
    figure = opened.page.locator("#memory figure")
    figure.scroll_into_view_if_needed()
    box = figure.locator("path[aria-roledescription=point]").last.bounding_box()
    opened.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    opened.page.locator("#vg-tooltip-element.visible").wait_for()
    for summary in opened.page.locator("figure summary").all():
        summary.click()
    assert opened.page.locator("img, iframe, object").count() == 0
    assert opened.page.locator("script").count() == 3
    assert opened.said == []
    assert len(opened.asked) == 1


def test_tables_can_be_read_without_scripts(window: Any, small: Path) -> None:
    opened = window(small, java_script_enabled=False)
    assert len(opened.cells("configurations", "total ms")) == 18
    assert opened.page.locator("figcaption").first.is_visible()


def test_a_comparison_opens_too(window: Any, small: Path) -> None:
    place = small.parent.parent
    opened = window(compare(place, place).path)
    assert opened.draw_all() == 2
    assert opened.said == []


def test_ten_thousand_points_are_sorted_and_filtered(window: Any, tmp_path: Path) -> None:
    columns = {"vcpus": [1, 2, 4, 8, 16], "memory_bytes": [(1 + n // 5) << 20 for n in range(10_000)]}
    opened = window(build_report(fabricate.dataset(tmp_path, 10_000, columns)).path)
    opened.page.locator("#configurations th", has_text="memory_bytes").locator("button").click()
    assert opened.cells("configurations", "memory_bytes")[:6] == ["1MiB"] * 5 + ["2MiB"]
    opened.page.locator("#configurations input").fill("vcpus=16 memory_bytes>=1GiB")
    assert opened.page.locator("#configurations [role=status]").inner_text() == "100 of 977 rows (10,000 without the filter)"
