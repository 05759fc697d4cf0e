"""The benchmark runs, and its page in the documentation is that of the results beside it."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases  # noqa: E402
import contenders  # noqa: E402
import measure  # noqa: E402
import page  # noqa: E402
import plots  # noqa: E402
import step_time  # noqa: E402

ALL = {case.name: case for device in ("cpu", "cuda") for case in cases.all_cases(device)}
DISTINCT: dict[object, str] = {}
"""One name for each case that differs when made small; compiling is slow, so it occurs once."""
for name, case in ALL.items():
    small = replace(cases.shrink(case), name="", group="")
    DISTINCT.setdefault("compiled" if small.compiled else small, name)


def test_the_page_is_that_of_the_results() -> None:
    page_file = page.DOCS / "benchmarks.md"
    text = page_file.read_text(encoding="utf-8")
    assert text == page.render(page.RESULTS), "run `python benchmarks/page.py`"
    library = (page.DOCS / "library.md").read_text(encoding="utf-8")
    assert page.WAYS in library
    assert library == page.with_ways(library, page.RESULTS), "run `python benchmarks/page.py`"
    groups = page.read_cases(page.read_reports(page.RESULTS))
    figures = re.findall(r"\]\((figures/.*?)\)", text)
    assert figures
    for name in figures:
        drawn = (page.DOCS / name).read_text(encoding="utf-8")
        assert plots.digest(groups) in drawn, f"{name} is old: run `python benchmarks/page.py`"
    for link in re.findall(r"\]\((?!\w+:)([^)]*)\)", text):
        assert (page.DOCS / link).exists(), link


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_case_names_are_unique_and_every_default_group_has_cases(device: str) -> None:
    names = [case.name for case in cases.all_cases(device)]
    assert len(names) == len(set(names))
    groups = {case.group for case in cases.all_cases(device)}
    assert set(cases.DEFAULT_GROUPS[device]) <= groups


@pytest.mark.parametrize("name", DISTINCT.values())
def test_every_case_builds_and_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    case = cases.shrink(ALL[name])
    models = contenders.build_models(case)
    contenders.check_same_function(case, models)
    found = contenders.build_contenders(case, models)
    expected = set(found)
    failed = contenders.start(found)
    assert set(found) | set(failed) == expected
    # A CUDA graph needs CUDA; PEFT Poly cannot be checkpointed.
    assert set(failed) <= {"polyroute graph", "poly"}
    assert ("poly" in failed) == case.checkpointing


def test_counts_see_work_reads_and_kept_memory() -> None:
    x = torch.ones(256, 256, requires_grad=True)
    assert measure.count(lambda: (x @ x).sum().item(), "cpu") == {"ops": 2, "host_syncs": 1}

    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> object:
            loss = (x.exp() * 1.0).sum()
            return type("Output", (), {"loss": loss})

    # exp keeps its result, a quarter of a megabyte
    assert measure.saved_megabytes(Square(), {"x": x}) == pytest.approx(0.25)


@pytest.mark.skipif(not measure.CLEAR_REFS.exists(), reason="reads the kernel's account of memory")
def test_the_peak_is_that_of_the_call_whatever_it_frees() -> None:
    peak = measure.peak_megabytes(lambda: torch.ones(50 * 2**18).sum(), "cpu")
    assert peak == pytest.approx(50, abs=5)


@pytest.mark.slow
def test_a_quick_run_writes_results_that_resume_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    short = cases.quick_cases()[1:3]  # one that generates, one of several inventories
    monkeypatch.setattr(step_time, "quick_cases", lambda: short[:1])
    quick = ["--quick", "--threads", "1", "--out", str(tmp_path)]
    assert step_time.main(quick) == 0
    monkeypatch.setattr(step_time, "quick_cases", lambda: short)
    assert step_time.main([*quick, "--resume"]) == 0
    report = json.loads((tmp_path / "step_time.json").read_text())
    assert [case["name"] for case in report["cases"]] == [case.name for case in short]
    for case in report["cases"]:
        for contender in case["contenders"].values():
            assert len(contender["wall_s"]) == case["rounds"] == 2
            assert contender["ops"] > 0
    assert capsys.readouterr().err.count("[2/2]") == 1

    page.main(["--results", str(tmp_path), "--docs", str(tmp_path)])
    text = (tmp_path / "benchmarks.md").read_text()
    assert all(f"`{case.name}`" in text for case in short)
    for name in re.findall(r"\]\((figures/.*?)\)", text):
        assert (tmp_path / name).stat().st_size > 1000

    report["machine"]["torch"] = "1.0"
    (tmp_path / "step_time.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match="torch"):
        step_time.main([*quick, "--resume"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_its_cases_are_skipped_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step_time.main(["--device", "cuda", "--out", str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
