"""What a library of LoRAs of SmolLM2 is good for, on tasks that none of its LoRAs learned.

    python benchmarks/library_study.py judge --loras FOLDER --data SUITE
    python benchmarks/library_study.py draws --data SUITE
    python benchmarks/library_study.py shares --loras FOLDER --data SUITE
    python benchmarks/library_study.py compiled --loras FOLDER --data SUITE
    python benchmarks/library_study.py frozen --loras FOLDER --data SUITE
    python benchmarks/library_study.py zero --loras FOLDER --data SUITE

The LoRAs are those of the contender `private` of `paper.py lm`, one for each training task of the
study on SmolLM2, all from one run that had the budget of each other contender. `--loras` names its
folder. The tasks are the development tasks of that study, and the held-out ones for `zero`, which
has nothing to choose. `draws` takes the eight LoRAs of `inventories/smollm2/loras`.

Each stage writes `benchmarks/results/library_STAGE.json` as it goes, and goes on where it stopped;
`python benchmarks/page.py` makes the tables of docs/benchmarks.md from them.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from library_merging import LORAS, RESULTS
from lm_studies import language_model
from paper_study import Study

import polyroute as pr
from polyroute.errors import InputError
from polyroute.host.files import make_folder, write_json
from polyroute.kinds.choose import ModelKind
from polyroute.library.controls import Given, random_skills
from polyroute.saved.runs import machine
from polyroute.study.examples import encoded

SETTINGS = pr.JudgeSettings(shots=32, randoms=1)
DRAWS = pr.JudgeSettings(shots=32, randoms=43)
"""Each random library is judged in its turn, with the three that follow it as controls."""
PLANTED = "clinc_home_intent"
"""A task with a LoRA of its own in the small library, which the judge has to find."""
TEXTS, RANK = 60, 16
"""Prompts on which a route is frozen, and the rank of the LoRA in its place."""
PROMPTS = 8
"""Of each training task, whose tokens' choices are counted."""
SKILLS = (8, 16, 32)
RULES: Mapping[str, pr.RouteRule] = {
    "arrow": pr.Arrow(top_k=1),
    "spectr": pr.SpectR(top_k=1),
    "spectr, weighted": pr.SpectR(top_k=1, weighted=True),
}
MHR = Path(__file__).parents[1] / "inventories" / "smollm2" / "grouped-s0"
"""Trained on the same tasks as the LoRAs, with the same budget."""
ZERO: Mapping[str, str | pr.RouteRule] = {
    "average": "mu", "arrow": pr.Arrow(), "spectr": pr.SpectR(),
}  # fmt: skip
AGAINST = ("average", "arrow")
"""What is also done with a random library."""
Found = dict[str, Any]
Stage = tuple[Sequence[str], Callable[[str], Found]]
"""What is measured, one after the other, and how."""


@dataclass(frozen=True)
class Place:
    """What all stages read."""

    data: str
    loras: Path
    most: int
    """Test examples of each task."""

    @cached_property
    def study(self) -> Study:
        """Has the suite, and the training and development tasks of the study on SmolLM2."""
        return language_model(Path(), Path(), self.data)

    def opened(self, loras: Path | Mapping[str, Path]) -> tuple[pr.RoutedModel, ModelKind]:
        """A library on its base model."""
        base, kind = self.study.base_and_kind()
        return pr.attach(base, pr.Library.from_peft(loras)).eval(), kind

    def scored(
        self, kind: ModelKind, model: pr.RoutedModel, task: str, route: str | pr.RouteRule | None
    ) -> Found:
        """The score of one task; its LoRA's own if `route` is None."""
        (found,) = pr.evaluate(
            model, kind, self.study.suite, [task], route=route, max_examples=self.most
        )
        return found.to_dict()


def exported(run: Path) -> Path:
    """The LoRAs of the tasks of a trained inventory, in a folder beside it; others as they are."""
    if not (run / "polyroute.json").exists():
        return run
    place = run.parent / f"{run.name}-loras"
    base, _ = pr.load_base("smollm2", dtype="bfloat16")
    model = pr.from_pretrained(base, run)
    for task in model.tasks:
        if not (place / task / "adapter_config.json").exists():
            model.export_peft(task, place / task)
    return place


def judge(place: Place) -> Stage:
    """Every use of the library on every development task."""
    return place.study.develop, _judged(place, exported(place.loras), SETTINGS)


def draws(place: Place) -> Stage:
    """Many random libraries in place of the small one, on its planted task and two new ones."""
    return (PLANTED, *place.study.develop[:2]), _judged(place, LORAS, DRAWS)


def _judged(place: Place, loras: Path, settings: pr.JudgeSettings) -> Callable[[str], Found]:
    model, kind = place.opened(loras)

    def one(task: str) -> Found:
        own = pr.judge(model, kind, place.study.suite, [task], settings, max_examples=place.most)
        scores = {name: [round(float(v), 6) for v in of] for name, of in own.scores.items()}
        return {"scores": scores, "single": list(own.chosen[task])}

    return one


def shares(place: Place) -> Stage:
    """The share of a task's tokens that choose the task's own LoRA, by block of the model."""
    model, kind = place.opened(exported(place.loras))

    def one(task: str) -> Found:
        rows = list(encoded(place.study.suite, task, "test", kind).select(range(PROMPTS)))
        own = model.tasks.index(task)
        found: Found = {}
        for name, rule in RULES.items():
            of_block: dict[str, list[float]] = {}
            with torch.no_grad(), model.record_gates() as gates, model.route(rule):
                for row in rows:
                    model(input_ids=torch.tensor([row["prompt_ids"]]))
            for gate in gates:
                is_own = gate.weights.flatten(0, -2)[:, own] > 0
                block = model.sites[gate.site].name.split(".")[2]
                of_block.setdefault(block, []).extend(is_own.float().tolist())
            found[name] = {block: round(fmean(of), 5) for block, of in of_block.items()}
        return found

    return place.study.train, one


def compiled(place: Place) -> Stage:
    """What is lost where the library becomes an inventory of few skills."""
    library = pr.Library.from_peft(exported(place.loras))

    def one(skills: str) -> Found:
        base, _ = place.study.base_and_kind()
        try:
            made = pr.compile_library(base, library, num_skills=int(skills), most_error=1.0)
        except InputError as error:
            return {"refused": str(error)}
        return {"errors": dict(made.errors)}

    return [str(skills) for skills in SKILLS], one


def frozen(place: Place) -> Stage:
    """One plain LoRA in place of Arrow, for each development task."""
    model, kind = place.opened(exported(place.loras))

    score = partial(place.scored, kind)

    def one(task: str) -> Found:
        rows = list(encoded(place.study.suite, task, "train", kind).select(range(TEXTS)))
        texts = [{"input_ids": torch.tensor([row["prompt_ids"]])} for row in rows]
        lora = pr.freeze(model, pr.Arrow(), texts, rank=RANK)
        with tempfile.TemporaryDirectory() as folder:
            lora.save_peft(folder)
            plain, _ = place.opened({task: Path(folder)})
        return {
            "arrow": score(model, task, pr.Arrow()),
            "frozen": score(plain, task, None),
            "error": lora.error,
        }

    return place.study.develop, one


def zero(place: Place) -> Stage:
    """What needs no example, on every held-out task, and MHR's average beside it."""
    model, kind = place.opened(exported(place.loras))
    base, _ = place.study.base_and_kind()
    inventory = pr.from_pretrained(base, MHR, tasks=[]).eval()

    score = partial(place.scored, kind)

    def one(task: str) -> Found:
        found = {"base": score(model, task, Given()), "MHR": score(inventory, task, "mu")}
        found |= {name: score(model, task, route) for name, route in ZERO.items()}
        with random_skills(model, 0):
            found |= {f"random, {name}": score(model, task, ZERO[name]) for name in AGAINST}
        return found

    return place.study.test, one


STAGES: Mapping[str, Callable[[Place], Stage]] = {
    one.__name__: one for one in (judge, draws, shares, compiled, frozen, zero)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--data", default="../shared/suite")
    parser.add_argument("--loras", type=Path, default=LORAS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--test", type=int, default=60, help="examples of each task")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    path = make_folder(RESULTS) / f"library_{options.stage}.json"
    loras = LORAS if options.stage == "draws" else exported(options.loras)
    count = len(list(loras.glob("*/adapter_config.json")))
    how = {
        "loras": loras.name, "count": count, "test": options.test, "texts": TEXTS, "rank": RANK,
    }  # fmt: skip
    content: dict[str, Any] = {"how": how, "found": {}, "machine": machine()}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["how"] != how:
            raise SystemExit(f"{path} was begun with {content['how']}, not with {how}: delete it")
    place = Place(options.data, options.loras, options.test)
    keys, one = STAGES[options.stage](place)
    for key in keys:
        if key not in content["found"]:
            content["found"][key] = one(key)
            write_json(path, content)
            print(key, str(content["found"][key])[:200], flush=True)


if __name__ == "__main__":
    main()
