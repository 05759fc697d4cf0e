"""The report of runs: what it computes, what it leaves out, and what it writes."""

import base64
import csv
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_runs import HELD_OUT, adapted, save_inventory, write, write_run, write_suite

from polyroute.errors import InputError
from polyroute.program.cli.app import main
from polyroute.report_page import figures, tables, write_report
from polyroute.report_page import routing as routing_module
from polyroute.report_page.contents import Contents, collect
from polyroute.report_page.data import read_runs
from polyroute.report_page.page import render
from polyroute.saved.checkpoint import read_checkpoint
from polyroute.study.analysis import saved_weights
from polyroute.study.intervals import estimates
from polyroute.study.routing_measures import route_similarity

TASKS = [f"task{i}" for i in range(9)]
HOSTILE = '</script><img src=x onerror="document.title=1">\'"& $x^2$ \u202eß→日 \ud800\x00'


class Elements(HTMLParser):
    """The names of all elements of a page, and the text of its JSON."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.json = ""
        self._is_json = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self._is_json = dict(attributes).get("type") == "application/json"

    def handle_endtag(self, tag: str) -> None:
        self._is_json = False

    def handle_data(self, data: str) -> None:
        self.json += data if self._is_json else ""


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_adapted(folder: Path, source: Path, results: list[dict[str, Any]]) -> Path:
    write(folder / "run.json", {"command": "adapt", "config": {"run": str(source)}})
    write(folder / "results.json", results)
    return folder


def row_of(report: Contents, name: str) -> int:
    return [row.name for row in report.rows].index(name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    place = tmp_path_factory.mktemp("runs")
    suite = str(write_suite(place / "suite", {t: "ab"[i % 2] for i, t in enumerate(TASKS)}))
    return [
        write_run(place / "poly", "poly", TASKS, level=0.52, data=suite),
        write_run(place / "mhr-s0", "mhr", TASKS, level=0.56, data=suite),
        write_run(place / "mhr-s1", "mhr", TASKS, seed=1, level=0.56, data=suite),
        write_run(place / "shared", "shared", TASKS, phases=("mu",), data=suite),
    ]


@pytest.fixture(scope="module")
def report(runs: list[Path]) -> Contents:
    return collect(runs)


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    page = tmp_path_factory.mktemp("report") / "new" / "all.html"
    main(["report", str(runs[0]), str(runs[3]), "--out", str(page)])
    return page


def test_intervals_are_those_of_drawing_tasks_anew() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, (60, 2))
    first, second = estimates(values)
    assert first.mean == pytest.approx(values[:, 0].mean(), abs=1e-12)
    error = values[:, 0].std() / math.sqrt(60)
    assert first.low == pytest.approx(first.mean - 1.96 * error, abs=0.08 * error)
    assert first.high == pytest.approx(first.mean + 1.96 * error, abs=0.08 * error)
    assert estimates(values[:, 1:])[0] == pytest.approx(second, abs=1e-12)


def test_intervals_of_two_tasks_are_known_exactly() -> None:
    # Drawing two of {0, 1} anew has mean 0, 1/2 or 1, with probability 1/4, 1/2 and 1/4.
    assert estimates(np.array([[0.0], [1.0]]))[0] == (0.5, 0.0, 1.0, 2)
    assert estimates(np.array([[0.3]]))[0] == (0.3, None, None, 1)


def test_a_row_is_the_mean_over_tasks_of_means_over_seeds(
    report: Contents, runs: list[Path]
) -> None:
    row = report.rows[row_of(report, "mhr: z, 8 shots")]
    by_task: dict[str, list[float]] = {}
    for run in runs[1:3]:
        for result in json.loads((run / "adapt-z-8" / "results.json").read_text()):
            by_task.setdefault(result["task"], []).append(result["score"])
    assert (row.repeats, row.estimate.tasks, row.parameters) == (4, len(HELD_OUT), 64)
    means = [np.mean(scores) for scores in by_task.values()]
    assert row.estimate.mean == pytest.approx(np.mean(means), abs=1e-12)


def test_runs_that_differ_by_their_seed_are_one_row_and_others_are_not(report: Contents) -> None:
    assert {row.run for row in report.rows} == {"poly", "mhr", "shared"}
    assert [run.name for run in report.runs] == ["poly", "mhr-s0", "mhr-s1", "shared"]


def test_differences_are_paired_by_task_with_shared_at_the_same_shots(report: Contents) -> None:
    first = report.references[0]
    assert first.name == "shared"
    i = row_of(report, "mhr: z, 32 shots")
    other = report.rows[row_of(report, "shared: mu, 32 shots")]
    assert report.rows[first.others[i] or 0] is other
    gains = [report.rows[i].scores[task] - other.scores[task] for task in HELD_OUT]
    assert first.differences[i] == pytest.approx(estimates(np.array([gains]).T)[0], abs=1e-12)
    assert first.differences[row_of(report, "shared: mu, 8 shots")] is None


def test_every_row_can_be_the_reference(report: Contents) -> None:
    names = [reference.name for reference in report.references]
    assert names == ["shared", "poly", "mhr", *(row.name for row in report.rows)]
    one, other = row_of(report, "mhr: z, 8 shots"), row_of(report, "mhr: mu, 8 shots")
    forth = report.references[3 + other].differences[one]
    back = report.references[3 + one].differences[other]
    assert forth is not None
    assert back is not None
    assert forth.mean == pytest.approx(-back.mean, abs=1e-12)
    assert forth.low == pytest.approx(-(back.high or 0), abs=1e-6)


def test_only_tasks_that_both_have_are_compared(tmp_path: Path) -> None:
    one = [adapted(t, 0, "mu", 8, 10, s) for t, s in (("a", 0.5), ("b", 0.7), ("c", 0.9))]
    two = [adapted(t, 0, "z", 8, 10, s) for t, s in (("b", 0.6), ("c", 0.6), ("d", 0.1))]
    other_split = [{**adapted("b", 0, "full", 8, 10, 0.2), "split": "validation"}]
    folder = write_adapted(tmp_path / "x", tmp_path / "run", one + two + other_split)
    report = collect([folder])
    mu, z, full = (row_of(report, f"run: {n}, 8 shots{v}") for n, v in
                   (("mu", ""), ("z", ""), ("full", ", validation")))  # fmt: skip
    gained = report.references[1 + mu].differences
    assert gained[z] is not None
    assert gained[z][0] == pytest.approx((-0.1 - 0.3) / 2)
    assert gained[z][3] == 2
    assert gained[full] is None


def test_similar_adaptations_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for name, score in (("slow", 0.2), ("fast", 0.4)):
        write_adapted(tmp_path / name, tmp_path / "r", [adapted("a", 0, "mu", 8, 10, score)])
    report = collect([tmp_path / "slow", tmp_path / "fast"])
    assert [(row.setting, row.estimate.mean) for row in report.rows] == [("", 0.2), ("fast", 0.4)]


def test_a_run_and_its_adaptation_given_twice_count_once(runs: list[Path]) -> None:
    once = collect([runs[0]])
    again = collect([runs[0], runs[0] / "adapt-z-8", runs[0]])
    assert again.rows == once.rows
    alone = collect([runs[0] / "adapt-z-8"])
    assert [row.name for row in alone.rows] == ["poly: z, 8 shots"]
    assert alone.rows[0].method == "poly"


def test_a_run_that_was_moved_keeps_its_adaptations(tmp_path: Path) -> None:
    source = write_run(tmp_path / "old", "poly", TASKS, phases=("z",), shots=(8,))
    source.rename(tmp_path / "new")
    report = collect([tmp_path / "new"])
    assert [row.name for row in report.rows] == ["new: z, 8 shots", "new: zero-shot"]


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in "ab":
        write(tmp_path / parent / "run" / "run.json", {"command": "train", "config": {}})
    report = collect([tmp_path / "a" / "run", tmp_path / "b" / "run"])
    assert [run.name for run in report.runs] == ["a/run", "b/run"]


def test_alignment_is_the_mean_of_what_was_measured(report: Contents, runs: list[Path]) -> None:
    measured = json.loads((runs[0] / "alignment.json").read_text())["measurements"]
    values = np.array([m["effective"] for m in measured], dtype=float)
    assert np.isnan(values).sum() == 1
    charts = {chart.key: chart for chart in report.charts}
    for view, axes in (("steps", (1, 2)), ("layers", (0, 2)), ("pairs", (0, 1))):
        series = charts[f"alignment-effective-{view}"].series
        assert [s.name for s in series] == ["poly", "mhr-s0", "mhr-s1", "shared"]
        found = [point.y for point in series[0].points]
        expected = np.nanmean(values, axis=axes)
        assert sorted(found) == pytest.approx(sorted(expected))
    points = charts["alignment-effective-pairs"].series[0].points
    assert {point.label for point in points} >= {"a and b", "c and d"}


def test_curves_over_shots_and_parameters_have_a_series_for_each_way(report: Contents) -> None:
    charts = {chart.key: chart for chart in report.charts}
    assert [s.name for s in charts["shots"].series] == [
        "poly: mu", "poly: z", "mhr: mu", "mhr: z", "shared: mu",
    ]  # fmt: skip
    assert [p.x for p in charts["shots"].series[0].points] == [8, 32]
    sizes = {s.name: s.points[0].x for s in charts["parameters"].series}
    assert sizes["mhr: z, 8 shots"] == 64
    assert len(charts["learning"].series[0].points) == 20


def test_a_phase_of_several_sizes_is_a_curve_over_parameters(tmp_path: Path) -> None:
    folders = []
    for heads in (1, 2, 4):
        source = tmp_path / f"h{heads}"
        config = {"method": "mhr", "heads": heads}
        write(source / "run.json", {"command": "train", "config": config})
        results = [adapted("a", 0, "z", 8, 10 * heads, 0.1 * heads)]
        folders.append(write_adapted(source / "adapt", source, results).parent)
    chart = next(c for c in collect(folders).charts if c.key == "parameters")
    curve = chart.series[0]
    assert [p.x for p in curve.points] == [10, 20, 40]
    assert [p.y for p in curve.points] == pytest.approx([0.1, 0.2, 0.4])


def test_embedded_weights_are_those_of_the_checkpoint(report: Contents, runs: list[Path]) -> None:
    content = report.routing[1].to_dict()
    whole = np.frombuffer(base64.b64decode(content["weights"]), "<i2")
    shape = (len(TASKS), len(content["routers"]), content["heads"], content["skills"])
    expected = saved_weights(read_checkpoint(runs[1]))
    assert expected is not None
    assert shape == tuple(expected.shape)
    np.testing.assert_allclose(
        whole.reshape(shape) * content["unit"], expected, rtol=0, atol=content["unit"]
    )
    assert content["unit"] < 1e-4


def test_the_map_of_three_tasks_keeps_their_distances(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mhr", "mhr", TASKS[:3])
    weights = saved_weights(read_checkpoint(run))
    assert weights is not None
    cosines = route_similarity(weights.double())
    routing = collect([run]).routing[0]
    places = torch.from_numpy(routing.places)
    torch.testing.assert_close(torch.cdist(places, places) ** 2, 2 - 2 * cosines, atol=1e-5, rtol=0)
    assert sum(routing.shares) == pytest.approx(1)
    assert sorted(routing.order) == [0, 1, 2]
    for task, near in enumerate(routing.nearest):
        assert near[0][1] == pytest.approx(float(cosines[task, near[0][0]]), abs=1e-6)


def test_categories_come_from_the_suite(report: Contents, tmp_path: Path, runs: list[Path]) -> None:
    assert report.routing[0].categories == [*"abababab", "a"]
    assert "chance" in report.routing[0].about
    other = write_suite(tmp_path / "other", {TASKS[0]: "other"})
    named = collect([runs[0]], data=str(other)).routing[0]
    assert named.categories == ["other", *[""] * 8]


def test_large_tables_are_cut_with_a_sentence(
    runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing_module, "MOST_CELLS", 20)
    monkeypatch.setattr(tables, "MOST_TASKS", 2)
    report = collect([runs[0]])
    assert len(report.routing[0].tasks) == 5
    assert sorted(report.routing[0].order) == [0, 1, 2, 3, 4]
    assert any("the first 5 of 9 tasks" in note for note in report.notes)
    page = render(report, "files")
    assert "The first 2 of 6; tasks.csv has all." in page
    assert ">new2</th>" not in page


def test_missing_and_damaged_parts_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write(bare / "run.json", {"command": "train", "config": {"method": "mhr", "data": "nowhere"}})
    broken = write_run(tmp_path / "broken", "poly", TASKS, phases=("z",), shots=(8,))
    write(broken / "alignment.json", {"tasks": 3})
    (broken / "metrics.json").write_text("{")
    write(broken / "evaluate-test.json", {"macro_average": 1, "split": "test", "tasks": [{}]})
    results = [adapted("a", 0, "z", 8, 64, None), adapted("b", 0, "z", 8, 64, 0.5)]
    write(broken / "adapt-z-8" / "results.json", [*results, "nonsense"])
    write(broken / "adapt-x" / "run.json", {"command": "adapt", "config": {}})
    write(broken / "adapt-x" / "results.json", {})
    report = collect([bare, broken])
    notes = "\n".join(report.notes)
    for part in (
        f"The run in {bare} has no inventory yet",
        f"The run in {bare} is unfinished",
        "alignment.json is damaged",
        "metrics.json is not valid JSON",
        "evaluate-test.json holds no score",
        "1 of 3 adaptations",
        "adapt-x/results.json is damaged",
        "no categories here",
    ):
        assert part in notes
    assert [row.name for row in report.rows] == ["broken: z, 8 shots", "broken: zero-shot"]
    assert report.rows[0].scores == {"b": 0.5}
    page = render(report, "files")
    assert "No run kept the losses of its training." in page
    assert "No run measured the alignment" in page


def test_a_run_of_which_nothing_is_left_is_still_a_page(tmp_path: Path) -> None:
    write(tmp_path / "bare" / "run.json", {"command": "train", "config": {}})
    page = render(collect([tmp_path / "bare"]), "files")
    assert "No run has scores" in page
    assert "No run has routing to show" in page


def test_a_demo_is_shown_by_method(tmp_path: Path) -> None:
    write(tmp_path / "run.json", {"command": "demo", "config": {}})
    results = [
        {"method": method, **adapted(task, 0, "mu", 8, 10, 0.5)}
        for method in ("shared", "mhr")
        for task in "ab"
    ]
    write(tmp_path / "results.json", {"adaptations": results})
    (tmp_path / "mhr").mkdir()
    save_inventory(tmp_path / "mhr", "mhr", TASKS, 4, 0)
    report = collect([tmp_path])
    assert [row.name for row in report.rows] == ["shared: mu, 8 shots", "mhr: mu, 8 shots"]
    assert [routing.run for routing in report.routing] == ["mhr"]


def test_the_page_holds_all_it_needs(written: Path) -> None:
    page = written.read_text(encoding="utf-8")
    elements = Elements(page)
    assert not {"link", "img", "iframe", "base"} & set(elements.names)
    addresses = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page
    content = json.loads(elements.json)
    assert content["references"][0]["name"] == "shared"
    assert len(content["routing"]) == 1


def test_each_figure_is_a_png_and_an_svg_with_its_numbers(written: Path) -> None:
    folder = written.with_name("all-files")
    names = {path.name for path in folder.iterdir()}
    figures = {name[:-4] for name in names if name.endswith(".csv")} - {"results", "tasks"}
    assert figures >= {"learning", "shots", "parameters", "routing-1-poly"}
    for name in figures:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text(encoding="utf-8")
    rows = read_csv(folder / "results.csv")
    gained = next(r for r in rows if (r["run"], r["phase"], r["shots"]) == ("poly", "z", "32"))
    base = next(r for r in rows if (r["run"], r["phase"], r["shots"]) == ("shared", "mu", "32"))
    difference = float(gained["mean"]) - float(base["mean"])
    assert float(gained["difference"]) == pytest.approx(difference, abs=1e-9)
    assert gained["compared_with"] == "shared: mu, 32 shots"
    assert [row["task"] for row in read_csv(folder / "tasks.csv")] == list(HELD_OUT)


def test_figures_show_every_point(report: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    for chart in report.charts:
        points = [point for series in chart.series for point in series.points]

        def check(figure: Any, stem: Path, points: Any = points) -> None:
            (left, right), (low, high) = figure.axes[0].get_xlim(), figure.axes[0].get_ylim()
            assert all(left <= p.x <= right and low <= p.y <= high for p in points), stem
            assert (left, right) != (0, 1)
            assert "$" not in "".join(t.get_text() for t in figure.axes[0].get_xticklabels())
            figures.plt.close(figure)

        monkeypatch.setattr(figures, "_save", check)
        figures.draw_chart(Path(chart.key), chart)


def test_names_of_tasks_cannot_break_the_page(tmp_path: Path) -> None:
    names = [HOSTILE, "x" * 5000, "plain"]
    known = re.sub("[\ud800\0]", "", HOSTILE)  # an inventory's names can be written everywhere
    run = write_run(tmp_path / "<b>run", "mhr", ["one", "two", known])
    results = [adapted(name, 0, "mu", 8, 10, 0.5) for name in names]
    write(run / "adapt-mu-8" / "results.json", results)
    (run / "alignment.json").unlink()
    page = tmp_path / "page.html"
    write_report([run], page)
    text = page.read_text(encoding="utf-8")
    elements = Elements(text)
    assert "img" not in elements.names
    assert "b" not in re.findall(r"<(\w+)>run", text)
    content = json.loads(elements.json)
    clean = HOSTILE.replace("\ud800", "\ufffd").replace("\x00", "\ufffd")
    assert known in content["routing"][0]["tasks"]
    assert read_csv(tmp_path / "page-files" / "tasks.csv")[0]["task"] == clean


def test_equal_runs_give_equal_pages_and_a_report_replaces_only_a_report(
    runs: list[Path], tmp_path: Path
) -> None:
    report = collect(runs)
    assert render(report, "x") == render(collect(runs), "x")
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(InputError, match="no report of polyroute"):
        write_report([runs[0]], page)
    assert page.read_text() == "mine"
    page.write_text(render(report, "x"))
    write_report([runs[3] / "adapt-mu-8"], page)
    assert "mhr" not in page.read_text(encoding="utf-8").partition("<main>")[0]


def test_what_cannot_be_reported_is_one_sentence(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["report", *arguments])
        assert caught.value.code == 2
        return capsys.readouterr().err

    (tmp_path / "empty").mkdir()
    (tmp_path / "mine-files").mkdir()
    (tmp_path / "mine-files" / "notes").write_text("")
    write(tmp_path / "other" / "run.json", {"command": "study", "config": {}})
    out = ("--out", str(tmp_path / "page.html"))
    assert "is not a run: there is no run.json in it" in error(str(tmp_path / "empty"), *out)
    assert "a run of `polyroute study`" in error(str(tmp_path / "other"), *out)
    assert "is a folder" in error(str(runs[0]), "--out", str(tmp_path))
    assert "belongs to no report" in error(str(runs[0]), "--out", str(tmp_path / "mine.html"))
    assert "there is no suite" in error(str(runs[0]), *out, "--data", str(tmp_path / "nowhere"))
    assert not (tmp_path / "page.html").exists()


def test_metrics_of_another_form_are_no_losses(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text('{"command": "train", "config": {}}')
    (folder / "metrics.json").write_text('{"log": 5}')
    runs, _ = read_runs([folder])
    assert runs[0].losses == []
