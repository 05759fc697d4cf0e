"""`polyroute library`, `merge` and `recompress` on LoRAs that PEFT wrote."""

from pathlib import Path

import pytest
import torch
from commands_run import Capture, document, read, refused
from models import llama, relative_error
from test_delta import flat_layers
from test_lora_import import PATTERNS, written
from transformers import T5ForConditionalGeneration

import polyroute as pr
from polyroute.library.merging import WAYS
from polyroute.library.names import METHODS, TOKEN_ROUTES
from polyroute.program.cli.app import main

peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two LoRAs that can be used, and one that cannot."""
    folder = tmp_path_factory.mktemp("loras")
    written(folder / "plain", r=2)
    written(folder / "deep" / "patterns", **PATTERNS)
    written(folder / "dora", use_dora=True)
    return folder


def test_library_shows_what_loras_are(loras: Path, capsys: Capture) -> None:
    rows = document(["library", str(loras), f"again={loras / 'plain'}"], capsys)["loras"]
    own = {row["name"]: row for row in rows}
    assert list(own) == ["deep/patterns", "plain", "again", "dora"]
    assert own["again"]["nearest"] == "plain"
    assert own["again"]["cosine"] == pytest.approx(1)
    assert "use_dora" in own["dora"]["refused"]
    main(["library", str(loras)])
    assert "left out: dora, because" in capsys.readouterr().out
    with pytest.warns(UserWarning, match="1 LoRA is left out"):
        main(["merge", str(loras), "--out", str(loras.parent / "merged")])


@pytest.mark.parametrize("method", METHODS)
def test_merge_writes_a_lora_that_peft_reads(
    loras: Path, tmp_path: Path, capsys: Capture, method: str
) -> None:
    given = ["merge", str(loras / "plain"), str(loras / "deep"), "--method", method, "--rank", "3"]
    result = document([*given, "--out", str(tmp_path / "out")], capsys)
    assert result["loras"] == ["plain", "patterns"]
    assert (result["method"], result["rank"]) == (method, 3)
    delta = pr.Delta.from_peft(tmp_path / "out")
    assert result["norm"] == pytest.approx(delta.norm(), rel=1e-5)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "out")
    assert len(delta.layers) == sum("lora_A" in name for name, _ in theirs.named_parameters())


def test_weights_choose_who_takes_part(loras: Path, tmp_path: Path, capsys: Capture) -> None:
    given = ["merge", str(loras), "--method", "arithmetic", "--out", str(tmp_path / "out")]
    result = document([*given, "--weight", "plain=-0.5"], capsys)
    assert result["loras"] == ["plain"]
    half = pr.Delta.from_peft(loras / "plain") * -0.5
    found = pr.Delta.from_peft(tmp_path / "out")
    assert relative_error(flat_layers(found), flat_layers(half)) < 1e-5
    document([*given, "--weight", "0.25"], capsys)
    assert set(pr.Delta.from_peft(tmp_path / "out").layers) == set(half.layers)


def test_recompress_keeps_what_it_can(loras: Path, tmp_path: Path, capsys: Capture) -> None:
    lora = str(loras / "deep" / "patterns")
    exact = document(["recompress", lora, "--energy", "1", "--out", str(tmp_path / "all")], capsys)
    assert exact["error"] == 0
    small = document(["recompress", lora, "--rank", "1", "--out", str(tmp_path / "one")], capsys)
    assert (small["rank"], small["lora"]) == (1, lora)
    whole, part = (pr.Delta.from_peft(tmp_path / name) for name in ("all", "one"))
    assert small["error"] == pytest.approx((whole - part).norm(), rel=1e-4)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--weight", "plan=1", "--method", "ties", "--rank", "2"], "no LoRA 'plan': did you mean"),
    (["--weight", "plain=much"], "--weight 'plain=much' must be a name and a number"),
    (["--weight", "1", "--weight", "2"], "is one number for all beside others"),
    (["--weight", "plain=1", "--weight", "plain=2"], "names 'plain' twice"),
    (["--method", "tie"], "did you mean 'ties'"),
    (["--method", "ties"], "say with rank or energy how much stays"),
    (["--method", "ties", "--keep", "1.5", "--rank", "2"], "keep must be at most 1"),
    (["--keep", "0.5"], "--keep is for ties, knots: leave it out with mean"),
    (["--method", "dare", "--drop", "1", "--rank", "2"], "drop must be in [0, 1)"),
    (["--rank", "2", "--energy", "0.5"], "--rank and --energy exclude each other"),
    (["--energy", "2"], "energy must be at most 1"),
    (["--rank", "0"], "rank must be a positive whole number"),
    (["--weight", "0.5"], "the mean has no weights"),
    (["--method", "arithmetic", "--weight", "1e39"], "the weight of a LoRA must be at most 1e+37"),
])  # fmt: skip
def test_what_cannot_be_merged_is_said(
    loras: Path, tmp_path: Path, capsys: Capture, arguments: list[str], sentence: str
) -> None:
    given = ["merge", str(loras / "plain"), "--out", str(tmp_path / "out"), *arguments]
    assert sentence in refused(given, capsys)
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def test_sources_are_not_overwritten_and_names_do_not_clash(
    loras: Path, tmp_path: Path, capsys: Capture
) -> None:
    plain = str(loras / "plain")
    assert "is, or contains, one of the LoRAs that are read" in refused(
        ["merge", plain, "--out", str(loras / "deep" / ".." / "plain")], capsys
    )
    assert "is, or contains, one of the LoRAs" in refused(
        ["merge", plain, "--out", str(loras)], capsys
    )
    assert "both have the name 'plain'" in refused(["library", plain, plain], capsys)
    assert "say with --rank or --energy" in refused(
        ["recompress", plain, "--out", str(tmp_path / "out")], capsys
    )
    assert "no adapter_config.json" in refused(["library", str(tmp_path)], capsys)


def test_every_way_to_merge_has_a_name_and_its_options() -> None:
    assert WAYS.keys() == METHODS.keys()
    for method, way in WAYS.items():
        names = way.__code__.co_varnames[1 : 1 + way.__code__.co_kwonlyargcount]
        assert names == METHODS[method]


def loras_of(place: Path) -> Path:
    """Two LoRAs of the tiny base model, named as two of its training tasks."""
    folder = place / "loras"
    for seed, name in enumerate(("copy", "upper")):
        base = T5ForConditionalGeneration.from_pretrained(place / "base")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2 + seed, target_modules=["q", "v"]))
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)
        model.save_pretrained(folder / name)
    return folder


def test_a_library_becomes_a_run(place: Path, capsys: Capture) -> None:
    folder, run = loras_of(place), place / "of-loras"
    given = ["import", str(folder), "--model", str(place / "base"), "--out", str(run)]
    assert "or take all as a library" in refused(given, capsys)
    found = document([*given, "--format", "library"], capsys)
    assert found["tasks"] == ["copy", "upper"]
    main(["export", str(run), "--task", "upper", "--out", str(place / "again")])
    again, first = (pr.Delta.from_peft(p) for p in (place / "again", folder / "upper"))
    assert again.cosine(first) == pytest.approx(1)
    data = ["evaluate", str(run), "--data", str(place / "suite")]
    own = document(data, capsys)
    assert [task["task"] for task in own["tasks"]] == ["copy", "upper"]
    for route in TOKEN_ROUTES:
        scored = document([*data, "--route", route, "--top-k", "1"], capsys)
        assert (scored["route"], scored["top_k"]) == (route, 1)
        assert [task["task"] for task in scored["tasks"]] == ["first", "pick"]
        assert read(run / f"evaluate-{route}-test.json")["tasks"] == scored["tasks"]
    for wrong, sentence in (
        (["--route", "arow"], "unknown --route 'arow': did you mean 'arrow'"),
        (["--top-k", "2"], "--top-k goes with --route"),
        (["--route", "arrow", "--zero-shot"], "without --zero-shot"),
    ):
        assert sentence in refused([*data, *wrong], capsys)
    adapted = ["adapt", str(run), "--data", str(place / "suite"), "--tasks", "first", "--phase",
               "mu", "--shots", "4", "--steps", "2", "--out", str(place / "adapted")]  # fmt: skip
    assert len(document(adapted, capsys)["results"]) == 3  # draws
    weights = [*adapted[:6], "--phase", "z", "--shots", "4", "--steps", "2", "--seeds", "0",
               "--out", str(place / "weights")]  # fmt: skip
    (result,) = document(weights, capsys)["results"]
    assert result["trained_parameters"] == 2  # a weight for each LoRA
    sum_of_both = pr.Delta.from_peft(place / "weights" / "first" / "seed-0")
    assert set(sum_of_both.ranks.values()) == {2 + 3}


def test_routes_have_the_names_of_their_rules() -> None:
    assert [rule.name for rule in (pr.Arrow, pr.SpectR, pr.LAG)] == list(TOKEN_ROUTES)


def test_a_run_is_ranked_and_a_route_frozen(place: Path, capsys: Capture) -> None:
    folder, run, data = loras_of(place), place / "to-rank", str(place / "suite")
    main(["import", str(folder), "--model", str(place / "base"), "--format", "library",
          "--out", str(run), "--max-target", "8"])  # fmt: skip
    given = ["rank", str(run), "--data", data, "--tasks", "first,pick", "--shots", "6"]
    ranked = document(given, capsys)["scores"]
    assert list(ranked) == ["first", "pick"]
    for scores in ranked.values():
        assert set(scores) == {"copy", "upper"}
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert document([*given, "--diversity", "1"], capsys)["scores"] == ranked  # none is left out
    out = place / "frozen"
    given = ["freeze", str(run), "--data", data, "--tasks", "first", "--rank", "4", "--texts", "20",
             "--tokens", "3", "--batch-size", "4", "--out", str(out)]  # fmt: skip
    found = document(given, capsys)
    assert (found["route"], found["texts"], found["rank"]) == ("arrow", 20, 4)
    assert found["error"] == pytest.approx(sum(found["errors"].values()) / len(found["errors"]))
    assert max(pr.Delta.from_peft(out).ranks.values()) == 4
    assert "frozen from the route arrow" in (out / "README.md").read_text()
    base = T5ForConditionalGeneration.from_pretrained(place / "base")
    assert peft.PeftModel.from_pretrained(base, out).num_parameters()
    for wrong, sentence in (
        (["--route", "spect"], "did you mean 'spectr'"),
        (["--texts", "12"], "at least 5 texts"),
        (["--rank", "0"], "rank must be a positive"),
    ):
        assert sentence in refused([*given, *wrong], capsys)
