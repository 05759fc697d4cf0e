"""A tiny T5 v1.1, and tiny suites in the formats of the presets."""

import json
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

WORDS = [a + b + c for a in "abcd" for b in "efgh" for c in "ijkl"]
TEMPLATE = """
dataset: super_glue
subset: rte
templates:
  one: !Template
    name: ask
    jinja: "{{premise}} So {{hypothesis}}?|||{{answer_choices[label]}}"
    answer_choices: "yes ||| no"
    metadata: !TemplateMetadata {original_task: true}
"""


def write_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=259, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def write_suite(folder: Path) -> Path:
    """Two tasks to train on and one held out, in files of records."""
    for name in ("copy", "upper", "first"):
        records = [
            {"instruction": "Do.", "input": w, "target": w[0] if name == "first" else w,
             "choices": ["a", "b", "c", "d"] if name == "first" else None,
             "split": "test" if i % 8 == 0 else "train"}
            for i, w in enumerate(WORDS)
        ]  # fmt: skip
        _write(folder / f"{name}.jsonl", records)
    roles = {
        name: {"category": "toy", "choices": name == "first",
               "metric": "accuracy" if name == "first" else "exact_match",
               "role": "held-out" if name == "first" else "train"}
        for name in ("copy", "upper", "first")
    }  # fmt: skip
    (folder / "roles.json").write_text(json.dumps(roles))
    return folder


def write_superni(folder: Path) -> Path:
    """Two tasks to train on and two held out, one of them with few instances."""
    for number, count in ((1, 20), (2, 20), (3, 108), (4, 103)):
        content = {
            "Definition": ["Say it again."], "Categories": ["Copying"], "Positive Examples": [],
            "Negative Examples": [],
            "Instances": [{"id": str(i), "input": f"a{i}", "output": ["a"]} for i in range(count)],
        }  # fmt: skip
        path = folder / "tasks" / f"task{number:03}_copy.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    splits = folder / "splits" / "default"
    splits.mkdir(parents=True)
    (splits / "train_tasks.txt").write_text("task001_copy\ntask002_copy\n")
    (splits / "test_tasks.txt").write_text("task003_copy\ntask004_copy\n")
    return folder


def write_t0(folder: Path) -> Path:
    """Two templates to train on, and the held-out task rte with few-shot files of two seeds."""
    for template in ("glue_mrpc_equivalent", "imdb_Movie_Expressed_Sentiment"):
        records = [
            {"inputs_pretokenized": f"Is {w} {w}?", "targets_pretokenized": "yes"}
            for w in WORDS * 2
        ]
        _write(folder / f"{template}.jsonl", records)
    rows = [{"premise": w, "hypothesis": w, "label": i % 2, "idx": i} for i, w in enumerate(WORDS)]
    for seed in (42, 0):
        _write(folder / "few_shot" / "rte" / "32_shot" / f"{seed}_seed.jsonl", rows[:32])
    _write(folder / "raw" / "super_glue" / "rte" / "validation.jsonl", rows[32:40])
    path = folder / "templates" / "super_glue" / "rte" / "templates.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(TEMPLATE)
    return folder


def _write(path: Path, records: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
