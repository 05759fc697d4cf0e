"""The page of a report in a real browser: that it runs, and that its controls do something."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from in_browser import luminance, needs_chromium
from playwright.sync_api import Browser, Page, expect
from report_runs import HELD_OUT, adapted, write, write_run, write_suite

from polyroute.report_page.contents import collect
from polyroute.report_page.page import render

HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">"
TASKS = [f"task{i}" for i in range(12)]

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("browser")
    suite = str(write_suite(place / "suite", {t: "abc"[i % 3] for i, t in enumerate(TASKS)}))
    shared = write_run(place / "shared", "shared", TASKS, phases=("mu",), data=suite)
    poly = write_run(place / "poly", "poly", TASKS, data=suite)
    mhr = write_run(place / "mhr", "mhr", TASKS, level=0.6, data=suite)
    results = [adapted(task, 0, "z", 8, 64, 0.5) for task in (*HELD_OUT, HOSTILE)]
    write(mhr / "adapt-z-8" / "results.json", results)
    page = place / "report.html"
    page.write_text(render(collect([shared, poly, mhr]), "report-files"), encoding="utf-8")
    return page.as_uri()


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """The page; afterwards, that nothing went wrong in it and nothing was fetched."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: request.url == address or wrong.append(request.url))
    page.goto(address)
    yield page
    assert page.title() == "polyroute report"
    context.close()
    assert wrong == []


def column(page: Page, number: int) -> list[str]:
    return page.locator(f"#results tbody tr > :nth-child({number})").all_inner_texts()


def means(page: Page) -> list[float]:
    return [float(text.split()[0]) for text in column(page, 7)]


def heat(page: Page) -> list[str]:
    return page.locator("#heat tbody td").all_inner_texts()


def test_every_chart_is_drawn(page: Page) -> None:
    expect(page.locator("figure.chart svg.plot")).to_have_count(9)
    for name in ("learning", "shots", "parameters"):
        assert page.locator(f'[data-chart="{name}"] g[data-series]').count() >= 3
    for name in ("entropy", "likeness"):
        assert page.locator(f'[data-chart="{name}"] g[data-series]').count() == 2
    assert (
        "poly: this inventory is one adapter" in page.locator("#apart-section > ul li").inner_text()
    )
    assert page.locator("#map .task").count() == len(TASKS)
    assert page.locator("#heat tbody tr").count() == len(TASKS)


def test_tables_sort_by_click_and_by_keyboard(page: Page) -> None:
    header = page.get_by_role("columnheader", name="mean score")
    button = header.get_by_role("button")
    button.click()
    assert header.get_attribute("aria-sort") == "descending"
    assert means(page) == sorted(means(page), reverse=True)
    button.press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert means(page) == sorted(means(page))
    page.locator("#results thead button").first.press("Space")
    assert column(page, 1) == sorted(column(page, 1))
    assert header.get_attribute("aria-sort") is None


def test_the_reference_changes_all_differences(page: Page) -> None:
    before = column(page, 8)
    assert "reference" in before
    page.locator("#reference").select_option("poly")
    assert page.locator("[data-reference]").inner_text() == "poly"
    after = column(page, 8)
    names = column(page, 1)
    assert {text for text, name in zip(after, names, strict=True) if name == "poly"} == {
        "reference"
    }
    content = json.loads(page.locator("#content").inner_text())
    poly = next(each for each in content["references"] if each["name"] == "poly")
    row = page.locator('#results tr[data-row="0"] > :nth-child(8) b').inner_text()
    assert float(row.strip(" *")) == pytest.approx(poly["differences"][0][0], abs=6e-4)


def test_scores_of_tasks_open_by_keyboard_and_show_any_name(page: Page) -> None:
    summary = page.locator("details.table > summary")
    assert not page.locator("#tasks").is_visible()
    summary.press("Enter")
    assert page.locator("#tasks").is_visible()
    assert HOSTILE in page.locator("#tasks tbody th").all_inner_texts()


def test_charts_read_their_points_and_hide_their_lines(page: Page) -> None:
    chart = page.locator('[data-chart="learning"]')
    plot, tip = chart.locator("svg.plot"), chart.locator(".tip")
    plot.press("ArrowRight")
    expect(tip).to_have_text(re.compile(r"^shared: 1\.6.*step 10$"))
    plot.press("ArrowRight")
    plot.press("ArrowDown")
    expect(tip).to_have_text(re.compile(r"^poly: .*step 20$"))
    plot.press("Escape")
    expect(tip).to_have_text("")
    box = plot.bounding_box()
    assert box is not None
    plot.hover(position={"x": box["width"] - 40, "y": box["height"] - 60})
    expect(tip).to_have_text(re.compile("step"))
    chart.get_by_role("button", name="poly").press("Enter")
    assert chart.locator('g[data-series="poly"]').count() == 0
    assert chart.locator('g[data-series="mhr"]').count() == 1


def test_the_measure_of_alignment_can_be_chosen(page: Page) -> None:
    titles = page.locator("#alignment figcaption")
    assert titles.count() == 3
    page.locator("#measure").select_option("Overlap of routes")
    assert titles.first.inner_text() == "Overlap of routes, over steps"


def test_the_explorer_shows_what_is_chosen(page: Page) -> None:
    mean = heat(page)
    page.locator("#router").select_option("up")
    up = heat(page)
    page.locator("#router").select_option("down")
    down = heat(page)
    assert up != down
    for both, one, other in zip(mean, up, down, strict=True):
        assert float(both) == pytest.approx((float(one) + float(other)) / 2, abs=0.011)
    page.locator("#run").select_option("mhr")
    expect(page.locator("#about-run")).to_contain_text("mhr: 12 tasks, 2 routers, 4 heads")
    whole = heat(page)
    page.locator("#head").select_option("head 3")
    assert heat(page) != whole
    page.locator("#order").select_option("by name")
    names = page.locator("#heat tbody th").all_inner_texts()
    assert [name.strip() for name in names] == TASKS


def test_the_heat_map_is_walked_by_arrow_keys(page: Page) -> None:
    page.locator("#order").select_option("by name")
    assert page.locator("#heat [tabindex='0']").count() == 1
    page.locator("#heat [tabindex='0']").press("ArrowDown")
    page.keyboard.press("ArrowRight")
    readout = page.locator("#readout")
    expect(readout).to_have_text(
        re.compile(r"^task1, skill 2: 0\.\d{3}\. Category b\. Most similar")
    )
    assert page.locator("tr.chosen").get_attribute("data-task") == "1"
    page.keyboard.press("Control+End")
    expect(readout).to_have_text(re.compile("^All tasks, skill 4"))
    page.keyboard.press("ArrowRight")
    expect(readout).to_have_text(re.compile("^All tasks, skill 4"))
    assert page.locator("#heat [tabindex='0']").count() == 1


def test_the_map_points_at_tasks_and_fades_categories(page: Page) -> None:
    page.locator("#map svg.plot").press("ArrowRight")
    first = page.locator("tr.chosen").get_attribute("data-task")
    places = json.loads(page.locator("#content").inner_text())["routing"][0]["places"]
    assert first == "0"
    way = "ArrowRight" if places[0][0] < max(x for x, _ in places) else "ArrowLeft"
    page.keyboard.press(way)
    then = int(page.locator("tr.chosen").get_attribute("data-task") or 0)
    assert (places[then][0] > places[0][0]) == (way == "ArrowRight")
    page.locator("#map .task").nth(5).hover(force=True)
    page.locator("#map").get_by_role("button", name="b", exact=True).press("Space")
    assert page.locator("#map .faded").count() == 4


def test_every_control_has_a_name_and_is_reached_by_tab(page: Page) -> None:
    for select in page.locator("select").all():
        assert select.evaluate("each => each.labels.length") == 1
    seen: set[str] = set()
    for _ in range(100):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        if "TD" in seen:
            break
    assert seen >= {"reference", "measure", "run", "router", "head", "order", "svg", "SUMMARY"}


def test_it_is_dark_where_that_is_wanted_and_light_in_print(page: Page) -> None:
    assert luminance(page, "body backgroundColor") > 0.9
    page.emulate_media(color_scheme="dark")
    assert luminance(page, "body backgroundColor") < 0.2
    assert luminance(page, "body color") > 0.8
    page.emulate_media(color_scheme="dark", media="print")
    assert luminance(page, "body color") < 0.2


def test_print_shows_whole_tables_and_no_controls(page: Page) -> None:
    page.emulate_media(media="print")
    for control in (".controls", "nav", "summary"):
        assert not page.locator(control).first.is_visible()
    assert page.locator("#tasks tbody tr").last.is_visible()
    scroll = page.locator("#heat-scroll")
    assert scroll.evaluate("each => getComputedStyle(each).maxHeight") == "none"
    assert page.pdf().startswith(b"%PDF")


def test_nothing_is_wider_than_a_narrow_screen(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_200_tasks_with_wide_names_can_be_walked(browser: Browser, tmp_path: Path) -> None:
    tasks = [f"task {i} " + "of a long name " * 4 for i in range(200)]
    run = write_run(tmp_path / "mhr", "mhr", tasks, skills=24)
    file = tmp_path / "page.html"
    file.write_text(render(collect([run]), "files"), encoding="utf-8")
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    page.goto(file.as_uri())
    assert page.locator("#heat tbody tr").count() == 200
    page.locator("#heat [tabindex='0']").press("Control+End")
    expect(page.locator("#readout")).to_have_text(re.compile("^All tasks, skill 24"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200
    page.close()
