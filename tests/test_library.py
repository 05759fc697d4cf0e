"""A library of LoRAs knows what they are, how alike they are, and merges them exactly."""

import shutil
from pathlib import Path

import pytest
import torch
from models import gpt2, llama
from test_delta import near
from test_lora_import import written
from unlike_loras import SETTINGS

import polyroute as pr
from polyroute.library import library as module


@pytest.mark.parametrize("at_once", [1, 2, 32])
def test_norms_and_cosines_are_those_of_pairs(
    loras: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    library = pr.Library.from_peft(loras)
    assert list(library) == sorted(SETTINGS)
    gram = library.gram()
    for i, one in enumerate(library.values()):
        for j, other in enumerate(library.values()):
            assert float(gram[i, j]) == pytest.approx(one.inner(other), rel=1e-9, abs=1e-9)
    for row in library.table():
        own = library[row["name"]]
        cosines = {name: own.cosine(d) for name, d in library.items() if name != row["name"]}
        nearest = max(cosines, key=cosines.__getitem__)
        assert row == {
            "name": row["name"],
            "layers": len(own.layers),
            "rank": max(own.ranks.values()),
            "norm": pytest.approx(own.norm()),
            "nearest": nearest,
            "cosine": pytest.approx(cosines[nearest]),
        }


def updates(delta: pr.Delta) -> dict[str, torch.Tensor]:
    return {name: own.b.double().t() @ own.a.double() for name, own in delta.layers.items()}


def test_merges_are_sums(loras: Path) -> None:
    library = pr.Library.from_peft({name: loras / name for name in ("rs", "plain", "patterns")})
    assert list(library) == ["rs", "plain", "patterns"]
    every = {name: updates(delta) for name, delta in library.items()}
    weights = {"rs": -0.5, "plain": 2}
    for merged, shares in (
        (library.merge("mean"), dict.fromkeys(library, 1 / 3)),
        (library.merge("arithmetic", weights=0.3), dict.fromkeys(library, 0.3)),
        (library.merge("arithmetic", weights=weights), weights),
        (library.merge("mean", energy=1), dict.fromkeys(library, 1 / 3)),
    ):
        for layer, update in updates(merged).items():
            parts = [share * every[n][layer] for n, share in shares.items() if layer in every[n]]
            assert near(update, torch.stack(parts).sum(0)), layer
    small = library.merge("mean", rank=2)
    assert max(small.ranks.values()) == 2
    assert small.error > 0


def test_a_library_of_one_is_that_one(loras: Path) -> None:
    library = pr.Library.from_peft({"one": loras / "rs"})
    assert library.table()[0].keys() == {"name", "layers", "rank", "norm"}
    merged = updates(library.merge("mean"))
    for layer, update in updates(library["one"]).items():
        assert near(merged[layer], update)


def test_what_does_not_belong_is_left_out_and_said(loras: Path, tmp_path: Path) -> None:
    written(tmp_path / "dora", use_dora=True)
    written(tmp_path / "other", gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    folders = {"good": loras / "plain", "dora": tmp_path / "dora", "gone": tmp_path / "gone"}
    with pytest.warns(UserWarning, match=r"2 LoRAs are left out \(dora: .* is no plain LoRA"):
        library = pr.Library.from_peft(folders)
    assert list(library) == ["good"]
    assert "use_dora" in library.refused["dora"]
    assert library.table()[1] == {"name": "dora", "refused": library.refused["dora"]}
    narrow = llama(hidden_size=16)
    written(tmp_path / "narrow", lambda: narrow)
    with pytest.warns(UserWarning, match="belongs to another base model"):
        pr.Library.from_peft({"good": loras / "plain", "narrow": tmp_path / "narrow"})
    with pytest.raises(pr.InputError, match="no LoRA can be used"):
        pr.Library.from_peft({"dora": tmp_path / "dora"})
    with pytest.raises(pr.InputError, match="there are no LoRAs in"):
        pr.Library.from_peft(tmp_path / "good")


def test_requests_that_make_no_sense_are_refused(loras: Path) -> None:
    library = pr.Library.from_peft(loras)
    with pytest.raises(pr.InputError, match="no LoRA 'plan': did you mean 'plain'"):
        _ = library["plan"]
    with pytest.raises(pr.InputError, match="is called 'tie': did you mean 'ties'"):
        library.merge("tie")
    with pytest.raises(pr.InputError, match="'ties' is dense: say with rank or energy"):
        library.merge("ties")
    with pytest.raises(pr.InputError, match="'wudi' has no option 'keep': it has ridge"):
        library.merge("wudi", keep=0.5)
    with pytest.raises(pr.InputError, match="'mean' has no option 'drop': it has none"):
        library.merge("mean", drop=0.5)
    for options in ({"keep": 0}, {"drop": 1}, {"drop": float("nan")}, {"keep": True}):
        with pytest.raises(pr.InputError, match="must be a number"):
            library.merge("ties", rank=2, **options)
    with pytest.raises(pr.InputError, match="ridge must be a number from 0 on"):
        library.merge("wudi", ridge=-1)
    with pytest.raises(pr.InputError, match="the weight of a LoRA must be a finite"):
        library.merge("knots", weights=float("nan"))
    with pytest.raises(pr.InputError, match="the mean has no weights"):
        library.merge("mean", weights=0.5)
    with pytest.raises(pr.InputError, match="name no LoRA"):
        library.merge("arithmetic", weights={})
    with pytest.raises(pr.InputError, match="either rank or energy"):
        library.merge("mean", rank=1, energy=0.5)
    assert "plain" in library
    assert "nonsense" not in library


def test_a_folder_counts_as_what_it_is(loras: Path, tmp_path: Path) -> None:
    assert list(pr.Library.from_peft(loras / "plain")) == ["plain"]
    shutil.copytree(loras / "plain", tmp_path / "run")
    shutil.copytree(loras / "plain", tmp_path / "run" / "checkpoint-10")
    assert list(pr.Library.from_peft(tmp_path)) == ["run"]
    with pytest.raises(pr.InputError, match="loras must be folders by name, or one folder"):
        pr.Library.from_peft([loras])  # type: ignore[arg-type]
    for name in ("..", "a/../b", "mu", "", 5, "a\nb"):
        with pytest.raises(pr.InputError, match=r"cannot be called|non-empty string|U\+000A"):
            pr.Library.from_peft({name: loras / "plain"})  # type: ignore[dict-item]
    with pytest.raises(pr.InputError, match="how their characters are composed"):
        pr.Library.from_peft({"\u00e9": loras / "plain", "e\u0301": loras / "plain"})
    library = pr.Library.from_peft(loras)
    assert library.get("none") is None
    assert library.get("plain") is not None


def test_the_library_of_the_repository_can_be_used() -> None:
    place = Path(__file__).parents[1] / "inventories" / "smollm2" / "loras"
    library = pr.Library.from_peft(place)
    assert len(library) == 8
    assert not library.refused
    for row in library.table():
        assert (row["layers"], row["rank"]) == (60, 2)
        assert row["norm"] > 1
        assert abs(row["cosine"]) < 0.5
