"""A tiny suite and base model on disk, and a run of the command line on them."""

import json
from pathlib import Path

import torch
from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

TRAIN_TASKS = {"copy": str, "upper": str.upper, "back": lambda s: s[::-1]}


def write_suite(folder: Path) -> Path:
    """Three training tasks with text targets, and two held out, one of them with choices."""
    folder.mkdir()
    words = [a + b + c for a in "abcd" for b in "efgh" for c in "ijkl"]
    tasks = {**TRAIN_TASKS, "first": lambda s: s[0]}
    for name, function in tasks.items():
        records = [
            {"instruction": "Do.", "input": w, "target": function(w), "choices": None}
            for w in words
        ]
        write_task(folder / f"{name}.jsonl", records)
    records = [
        {"instruction": "Pick.", "input": w, "target": "yes" if w[0] in "ab" else "no",
         "choices": ["yes", "no"]}
        for w in words
    ]  # fmt: skip
    write_task(folder / "pick.jsonl", records)
    roles = {
        name: {"category": "toy", "choices": name == "pick",
               "metric": "accuracy" if name == "pick" else "exact_match",
               "role": "train" if name in TRAIN_TASKS else "held-out"}
        for name in [*tasks, "pick"]
    }  # fmt: skip
    (folder / "roles.json").write_text(json.dumps(roles))
    return folder


def write_task(path: Path, records: list[dict[str, object]]) -> None:
    splits = ["train"] * 44 + ["validation"] * 8 + ["test"] * 12
    lines = [json.dumps({**r, "split": s}) for r, s in zip(records, splits, strict=True)]
    path.write_text("\n".join(lines) + "\n")


def write_base(folder: Path) -> None:
    """A T5 of random weights that reads bytes."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=259, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)


def train_arguments(place: Path, run: str, *extra: str) -> list[str]:
    return [
        "train", "--model", str(place / "base"), "--data", str(place / "suite"), "--method", "mhr",
        "--skills", "3", "--heads", "4", "--rank", "2", "--alpha", "3", "--steps", "12",
        "--batch-size", "8", "--save-steps", "4", "--max-input", "32", "--max-target", "16",
        "--out", str(place / run), *extra,
    ]  # fmt: skip
