"""The page in a real browser: that it loads, moves, sorts, filters, fits and stays by itself."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.report import build_report

from report_runs import LCM, PCM, PROTOCOL, TEACHER, make_run, measured

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason=f"no browser is installed: {', '.join(NAMES)}"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield running
        running.close()


class Visit:
    """A page that is open, and everything that went wrong on it."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.context.route("http*://**", lambda route: route.abort())
        self.page.goto(file.as_uri())
        self.address = file.as_uri()

    def see_everything(self) -> None:
        """Scrolls through the page, so that all that waits to be seen is made."""
        height = self.page.evaluate("document.scrollingElement.scrollHeight")
        for y in range(0, height, 500):
            self.page.evaluate("y => scrollTo(0, y)", y)
            self.page.wait_for_timeout(40)

    def texts(self, selector: str) -> list[str]:
        """The visible texts of some elements."""
        return [t.strip() for t in self.page.locator(f"{selector}:visible").all_inner_texts()]

    def close(self) -> None:
        """Closes the page, and fails if anything went wrong on it or was asked of elsewhere."""
        self.context.close()
        assert self.wrong == []
        elsewhere = [url for url in self.requests if not url.startswith(("data:", "blob:"))]
        assert set(elsewhere) == {self.address}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of a student, one of another, a teacher, an odd one out, clips and stages."""
    root = tmp_path_factory.mktemp("runs")

    def run(name: str, method: str, values: dict[int, float], seed: int = 0, **more: Any) -> None:
        numbers = measured(values, metric="fid") + measured(
            {steps: 1 / (1 + value) for steps, value in values.items()},
            metric="recall",
            better="higher",
        )
        config = {"seed_everything": seed, "model": {"init_args": {"method": method}}}
        options = {"version": f"version_{seed}", "config": config} | more
        make_run(root, name, method, numbers, **options)

    run("teacher", TEACHER, {4: 2.0, 50: 0.5}, updates=(1000, 3000))
    for seed, value in enumerate((1.0, 3.0, 2.0)):
        run("lcm", LCM, {1: 9.0, 4: value}, seed, updates=(250, 500), clips=True)
    run("pcm <b>four</b>", PCM, {4: 10.5}, updates=(100, 250, 500), clips=True)
    make_run(root, "odd", LCM, measured({4: 0.1}, metric="fid", protocol={**PROTOCOL, "x": 1}))
    return build_report([root], root / "report.html", tables=root / "tables")


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Visit]:
    opened = Visit(browser, report, viewport={"width": 1300, "height": 900})
    yield opened
    opened.close()


ROWS = "#leaderboard div:not([hidden]) > .scroll tbody tr:not(.member) th"


def names(visit: Visit) -> list[str]:
    """The first line of every row of the leaderboard, from above."""
    return [text.split("\n")[0].removesuffix(" a") for text in visit.texts(ROWS)]


def sort_by(visit: Visit, column: str) -> str | None:
    """Clicks a column's head; returns what it then says of its order."""
    head = visit.page.locator("#leaderboard th:visible", has_text=column).first
    head.get_by_role("button").click()
    return head.get_attribute("aria-sort")


def test_everything_is_drawn_without_an_error_or_a_request(visit: Visit) -> None:
    visit.see_everything()
    shown = visit.page.locator("figure.chart:visible")
    assert shown.count() >= 3
    assert visit.page.locator("figure.chart:visible .series").count() > shown.count()
    assert visit.page.locator("#samples img:visible").count() > 0
    widths = visit.page.evaluate(
        "[...document.querySelectorAll('#samples img')].filter(i => i.checkVisibility())"
        ".map(i => i.naturalWidth)"
    )
    assert all(width > 0 for width in widths)


def test_text_from_files_stays_text_in_what_scripts_draw(visit: Visit) -> None:
    visit.see_everything()
    assert visit.page.locator("main b", has_text="four").count() == len(
        visit.page.locator("figcaption b", has_text="pcm <b>four</b>").all()
    )
    assert visit.page.locator("svg b").count() == 0


def test_tables_sort_by_number_with_blanks_last_and_say_so(visit: Visit) -> None:
    assert names(visit) == ["teacher", "lcm", "odd", "pcm <b>four</b>"]
    assert sort_by(visit, "4 steps") == "ascending"
    assert names(visit) == ["teacher", "odd", "lcm", "pcm <b>four</b>"]
    assert sort_by(visit, "4 steps") == "descending"
    assert names(visit) == ["teacher", "pcm <b>four</b>", "lcm", "odd"]
    for _ in range(2):
        sort_by(visit, "1 step")
        assert names(visit)[1] == "lcm", "the others have no value"


def test_where_more_is_better_the_first_click_puts_the_largest_first(visit: Visit) -> None:
    visit.page.select_option("#leaderboard select.metric", "recall")
    assert sort_by(visit, "4 steps") == "descending"
    assert visit.page.locator("#quality select.metric").input_value() == "recall"
    assert names(visit) == ["teacher", "lcm", "pcm <b>four</b>"]


def test_a_head_is_a_button_that_a_keyboard_presses(visit: Visit) -> None:
    button = visit.page.locator("#leaderboard th:visible button", has_text="4 steps")
    button.focus()
    visit.page.keyboard.press("Enter")
    assert visit.page.locator("#leaderboard th[aria-sort=ascending]:visible").count() == 1


def test_seeds_unfold_below_their_row_and_stay_there_when_it_moves(visit: Visit) -> None:
    members = visit.page.locator("#leaderboard tr.member:visible")
    assert members.count() == 0
    fold = visit.page.locator("#leaderboard .fold:visible")
    fold.click()
    assert fold.get_attribute("aria-expanded") == "true"
    assert members.count() == 3
    sort_by(visit, "4 steps")
    everything = visit.texts("#leaderboard div:not([hidden]) > .scroll tbody th")
    first = [text.split("\n")[0] for text in everything]
    assert first[first.index("lcm") + 1 :][:3] == ["seed 0", "seed 1", "seed 2"]


def test_the_slider_moves_every_student_and_leaves_the_teacher(visit: Visit) -> None:
    visit.page.locator("#samples").scroll_into_view_if_needed()
    slider = visit.page.get_by_label("Student updates")
    visit.page.locator("#shown-steps").select_option("4")
    visit.page.wait_for_timeout(300)

    def stages() -> dict[str, str]:
        captions = visit.page.locator("#samples figure:visible figcaption").all()
        return {c.locator("b").inner_text(): c.locator(".at").inner_text() for c in captions}

    def sources() -> list[str]:
        images = visit.page.locator("#samples figure:visible img")
        return [image.get_attribute("src") or "" for image in images.all()]

    late, before = stages(), sources()
    assert late == {
        "teacher": "3,000 updates",
        "lcm, seed 0": "500 updates",
        "odd": "600 updates",
        "pcm <b>four</b>": "500 updates",
    }
    slider.focus()
    visit.page.keyboard.press("ArrowLeft")
    visit.page.keyboard.press("ArrowLeft")
    assert slider.get_attribute("aria-valuetext") == "250 updates"
    visit.page.wait_for_timeout(200)
    assert stages() | {"odd": ""} == {
        "teacher": "3,000 updates",
        "lcm, seed 0": "250 updates",
        "odd": "",
        "pcm <b>four</b>": "250 updates",
    }
    after = sources()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, False, False]
    visit.page.keyboard.press("ArrowLeft")
    assert stages()["lcm, seed 0"].startswith("none after 100"), "it has no picture that early"
    visit.page.get_by_role("button", name="Play").click()
    visit.page.wait_for_function("document.getElementById('play').ariaPressed === 'false'")
    assert stages() == late, "it plays to the end and stops there"


def test_clips_play_and_can_be_stopped(visit: Visit) -> None:
    visit.page.locator("#shown-steps").select_option("4")
    figure = visit.page.locator("#samples figure:visible", has_text="lcm, seed 0")
    image = figure.locator("img")
    image.scroll_into_view_if_needed()
    visit.page.wait_for_timeout(400)
    assert (image.get_attribute("src") or "").startswith("data:image/webp")

    def moving() -> bool:
        seen = set()
        for _ in range(6):
            seen.add(image.screenshot())
            visit.page.wait_for_timeout(90)
        return len(seen) > 1

    assert moving()
    visit.page.get_by_label("moving").uncheck()
    visit.page.wait_for_timeout(200)
    assert not moving()


def test_a_picture_can_be_enlarged_and_put_back_by_keyboard(visit: Visit) -> None:
    button = visit.page.locator("#samples figure:visible button").first
    button.scroll_into_view_if_needed()
    visit.page.wait_for_timeout(300)
    button.focus()
    visit.page.keyboard.press("Enter")
    large = visit.page.locator("dialog img")
    assert large.evaluate("i => i.decode().then(() => i.naturalWidth)") > 0
    visit.page.keyboard.press("Escape")
    assert not large.is_visible()


def test_runs_that_are_filtered_out_are_gone_from_every_section(visit: Visit) -> None:
    visit.see_everything()
    lines = visit.page.locator("#quality .chart:visible").first.locator(".series")
    assert lines.count() == 4
    visit.page.fill("#filter", "ConsistencyDist method=phased")
    assert names(visit) == ["pcm <b>four</b>"]
    visit.page.locator("#quality .chart:visible").first.scroll_into_view_if_needed()
    visit.page.wait_for_timeout(200)
    assert lines.count() == 1
    assert len(visit.texts("#settings tbody tr")) == 1
    visit.page.fill("#filter", "")
    visit.page.get_by_role("button", name="None", exact=True).click()
    assert names(visit) == []
    visit.page.locator(".panel li", has_text="teacher").get_by_role("checkbox").check()
    assert names(visit) == ["teacher"]


def test_hovering_over_a_run_makes_the_others_faint(visit: Visit) -> None:
    visit.see_everything()
    visit.page.locator("#quality .chart:visible").first.scroll_into_view_if_needed()
    visit.page.wait_for_timeout(200)
    visit.page.locator(".panel li", has_text="teacher").hover()
    opacities = visit.page.evaluate(
        "[...document.querySelectorAll('#quality [data-metric]:not([hidden]) .chart .series')]"
        ".map(s => [s.dataset.group, +getComputedStyle(s).opacity])"
    )
    assert {group for group, opacity in opacities if opacity == 1} == {"0"}


def test_a_point_of_a_chart_tells_its_run_and_value(visit: Visit) -> None:
    visit.page.locator("#quality").scroll_into_view_if_needed()
    dot = visit.page.locator("#quality .chart:visible .series[data-group='0'] .dot").last
    dot.scroll_into_view_if_needed()
    dot.hover()
    text = visit.page.locator("#tip").inner_text()
    assert text.splitlines()[:2] == ["teacher", "50 steps: 0.500"]


def test_what_the_page_exports_is_what_the_command_writes(visit: Visit, report: Path) -> None:
    for kind, end in (("CSV", "csv"), ("Markdown", "md"), ("LaTeX", "tex")):
        label = f"Download {kind}: fid by sampling steps, lower is better"
        with visit.page.expect_download() as download:
            visit.page.get_by_role("button", name=label).click()
        name = f"leaderboard-fid.{end}"
        assert download.value.suggested_filename == name
        saved = Path(download.value.path()).read_text(encoding="utf-8")
        assert saved == (report.parent / "tables" / name).read_text(encoding="utf-8")


def test_exports_leave_out_runs_that_are_not_shown(visit: Visit) -> None:
    visit.page.fill("#filter", "pcm")
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="Download CSV: fid by").click()
    rows = csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8")))
    assert [(row["run"], row["4 steps"]) for row in rows] == [("pcm <b>four</b>", "10.5")]


def test_copying_reaches_the_clipboard(browser: Any, report: Path) -> None:
    visit = Visit(browser, report, permissions=["clipboard-read", "clipboard-write"])
    visit.page.get_by_role("button", name="Copy Markdown: fid by").click()
    visit.page.get_by_text("Markdown copied.").wait_for()
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert copied == (report.parent / "tables/leaderboard-fid.md").read_text(encoding="utf-8")
    visit.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_it_without_scrolling_sideways(
    browser: Any, report: Path, scheme: str
) -> None:
    visit = Visit(
        browser, report, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    visit.see_everything()
    visit.page.locator(".panel summary").click()
    for part in visit.page.locator("main details summary").all():
        part.click()
    assert visit.page.evaluate("document.scrollingElement.scrollWidth") <= 360
    colour = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")
    visit.close()


def test_a_hundred_runs_with_twenty_pictures_each_load_within_two_seconds(
    browser: Any, tmp_path: Path
) -> None:
    for number in range(100):
        values = {steps: 1 + (number * 7 % 13) / steps for steps in (1, 2, 4, 8)}
        numbers = measured(values, metric="fid") + measured(values, metric="kid")
        updates, config = (100, 200, 300, 400, 500), {"model": {"lr": number}}
        folder = make_run(
            tmp_path, f"run_{number:03d}", LCM, numbers, updates=updates, curves=0, config=config
        )
        rows = (
            f"{step},0,{name},{1 / step + number}\n" for step in range(1, 501) for name in CURVES
        )
        (folder / "metrics.csv").write_text("".join(rows))
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = build_report([tmp_path], tmp_path / "report.html")
    assert page.read_text(encoding="utf-8").count(">data:image/") == 2000
    visit = Visit(browser, page, viewport={"width": 1300, "height": 900})
    times = []
    for _ in range(4):  # the quickest tells of the page, the others of what else the machine does
        times.append(
            visit.page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        )
        row = visit.page.locator(ROWS).first
        assert row.is_visible()
        assert row.inner_text().startswith("run_000")
        visit.page.reload()
    print(f"{page.stat().st_size / 1e6:.1f} MB in {', '.join(f'{t:.0f}' for t in times)} ms")
    assert min(times) < 2000
    visit.page.get_by_role("button", name="Best 8").click()
    assert len(names(visit)) == 8
    looks = visit.page.evaluate("[...state.shown].map(i => colourOf(i))")
    assert len(set(looks)) == 8, "no two of few runs have one colour"
    visit.close()


CURVES = ("train/loss", "train/grad_norm", "val/loss", "throughput/samples_per_second")
