"""Make the starter suite that comes with polyroute, from a folder of tasks with open licences.

    python scripts/make_starter.py ../shared/suite

Each task keeps a sample of its examples and the fields that a suite needs. The page beside the
tasks names every source, its licence and what was changed.
"""

import argparse
import json
import random
from pathlib import Path

TRAIN = (
    "banking77_10way", "bio_bc5cdr_chem", "blimp_irregular_forms", "blimp_npi_licensing",
    "clinc_banking_intent", "clinc_domain", "creak_claims", "dnc_megaveridicality",
    "mawps_operation", "qasc_8way", "persona_subscribes_to_virtue_ethics",
    "restaurant8k_people", "semeval10_relation", "snips_artist", "snips_intent", "snips_playlist",
)  # fmt: skip
HELD_OUT = (
    "blimp_subject_verb_agreement", "clinc_home_intent", "clinc_work_intent", "commonsenseqa",
    "persona_machiavellianism", "restaurant8k_date", "snips_object_name", "winobias_type1",
)  # fmt: skip
KEPT = {
    "train": {"train": 240, "validation": 20, "test": 40},
    "held-out": {"train": 80, "validation": 20, "test": 100},
}
"""Most examples of each split, by role."""
FIELDS = ("instruction", "input", "target", "choices", "split")
PLACE = Path(__file__).parents[1] / "src" / "polyroute" / "data" / "starter"
PAGE = """\
# The starter suite

{train} training tasks and {held_out} held-out ones with {examples:,} examples, to train on while
you read. `--data starter` names it wherever polyroute takes a suite.

The examples come from data sets that others published. Each keeps the licence of its source, which
is not that of polyroute. Changes: the instructions are our wording, long inputs are left out,
answers of some tasks are samples of the labels or spans of the annotations, and a sample of the
examples is kept. `scripts/make_starter.py` made the files. The licences are
[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/),
[CC BY 3.0](https://creativecommons.org/licenses/by/3.0/),
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/),
[MIT](https://opensource.org/license/mit) and
[Apache 2.0](https://www.apache.org/licenses/LICENSE-2.0); the repositories name the authors.

| task | role | kind | examples (train, validation, test) | source | licence |
|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Write the suite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", type=Path, help="the folder that the tasks are taken from")
    suite = parser.parse_args().suite
    described = json.loads((suite / "roles.json").read_text(encoding="utf-8"))
    PLACE.mkdir(exist_ok=True)
    roles, rows, examples = {}, [], 0
    for role, tasks in (("train", TRAIN), ("held-out", HELD_OUT)):
        for task in tasks:
            records = _records(suite / f"{task}.jsonl", KEPT[role])
            lines = [
                json.dumps({name: r[name] for name in FIELDS}, ensure_ascii=False) for r in records
            ]
            (PLACE / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
            roles[task] = {**described[task], "role": role}
            licence = records[0]["licence"]
            source = "[{0}](https://github.com/{0})".format(records[0]["source"])
            counts = [sum(r["split"] == split for r in records) for split in KEPT[role]]
            examples += len(records)
            rows.append(
                f"| {task} | {role} | {described[task]['category']} | "
                f"{', '.join(map(str, counts))} | {source} | {licence} |"
            )
    (PLACE / "roles.json").write_text(json.dumps(roles, indent=1, sort_keys=True) + "\n")
    page = PAGE.format(
        train=len(TRAIN), held_out=len(HELD_OUT), examples=examples, rows="\n".join(rows)
    )
    (PLACE / "README.md").write_text(page, encoding="utf-8")


def _records(file: Path, kept: dict[str, int]) -> list[dict[str, str]]:
    """A sample of the examples of a file, in its order, with the same draw in every run."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = []
    for split, most in kept.items():
        own = [number for number, record in enumerate(records) if record["split"] == split]
        drawn = random.Random(f"{file.stem} {split}").sample(own, min(most, len(own)))
        found += sorted(drawn)
    return [records[number] for number in found]


if __name__ == "__main__":
    main()
