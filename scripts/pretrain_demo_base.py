"""Pretrain the tiny base model that the demo ships with.

The base reads `prefix + newline + words` and writes the answer of a composition of skills. The
prefix is either a control code, one character per skill and some of them hidden by a question
mark, or filler that says nothing. The base so acquires every skill, and where the skill is hidden
it spreads its belief over all of them. It sees neither the held-out compositions nor any of the
instructions of the demo. The defaults reproduce the shipped model.
"""

from __future__ import annotations

import argparse
import math
import random
import string
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import ByT5Tokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

from polyroute.demo.suite import CODES, PRETRAINING, TASKS, Skills, answer, sample_words

BATCH_SIZE = 256
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 200
WEIGHT_DECAY = 0.01
GRADIENT_NORM = 1.0
FILLER_SHARE = 0.4
HIDDEN_SHARE = 0.25
FILLER_BYTES = (20, 50)
MAX_NEW_TOKENS = 16
EVALUATION_PER_TRIPLE = 50
DEFAULT_OUT = Path(__file__).parents[1] / "src" / "polyroute" / "demo" / "base"

# The byte-level vocabulary: three special tokens, then the 256 bytes.
PAD, END, BYTE_OFFSET = 0, 1, 3
VOCABULARY = 259

Example = tuple[str, str]


def new_model() -> T5ForConditionalGeneration:
    """Build the untrained base."""
    config = T5Config(  # type: ignore[call-arg]
        vocab_size=VOCABULARY,
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        # Finer than T5's default, to tell positions within a word apart.
        relative_attention_num_buckets=64,
        relative_attention_max_distance=128,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    model = T5ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=MAX_NEW_TOKENS,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        eos_token_id=END,
    )
    return model


def control_code(skills: Skills) -> str:
    """Name the skills, one character each."""
    return "".join(CODES[skill] for skill in skills)


def hide_some(code: str, rng: random.Random) -> str:
    """Replace each character of a control code by a question mark now and then."""
    return "".join("?" if rng.random() < HIDDEN_SHARE else char for char in code)


def filler(rng: random.Random) -> str:
    """Make up a sentence of pseudo-words that says nothing about the answer."""
    size = rng.randint(*FILLER_BYTES)
    text = ""
    while len(text) < size:
        word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(1, 9)))
        if not text or rng.random() < 0.1:
            word = word.capitalize()
        text += word + (", " if rng.random() < 0.15 else " ")
    return text[: size - 1].rstrip(", ") + "."


def make_example(skills: Skills, prefix: str, rng: random.Random) -> Example:
    """Draw the words for a composition and pair the input text with its target."""
    words = sample_words(rng, skills)
    return f"{prefix}\n{' '.join(words)}", answer(words, skills)


def training_batches(rng: random.Random) -> list[list[Example]]:
    """Draw one batch, as a part with control codes and a part with filler.

    The parts differ in length; kept apart they need less padding.
    """
    coded, filled = [], []
    for _ in range(BATCH_SIZE):
        skills = rng.choice(PRETRAINING)
        if rng.random() < FILLER_SHARE:
            filled.append(make_example(skills, filler(rng), rng))
        else:
            coded.append(make_example(skills, hide_some(control_code(skills), rng), rng))
    return [part for part in (coded, filled) if part]


def encode(texts: Sequence[str], padding: int) -> torch.Tensor:
    """Encode texts as ByT5 does: bytes shifted past the special tokens, then the end token."""
    rows = [[byte + BYTE_OFFSET for byte in text.encode()] + [END] for text in texts]
    width = max(map(len, rows))
    return torch.tensor([row + [padding] * (width - len(row)) for row in rows])


def batch_loss(model: T5ForConditionalGeneration, batch: Sequence[Example]) -> torch.Tensor:
    """Compute the mean cross-entropy of the targets of a batch, per token."""
    inputs = encode([text for text, _ in batch], PAD)
    labels = encode([target for _, target in batch], -100)
    output = model(input_ids=inputs, attention_mask=(inputs != PAD).long(), labels=labels)
    loss: torch.Tensor = output.loss
    return loss


def learning_rate_factor(steps: int) -> Callable[[int], float]:
    """Build the schedule: linear warm-up, then cosine decay to zero."""

    def factor(step: int) -> float:
        if step < WARMUP_STEPS:
            return (step + 1) / WARMUP_STEPS
        progress = (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)
        return 0.5 * (1 + math.cos(math.pi * progress))

    return factor


def train(model: T5ForConditionalGeneration, steps: int, seed: int, every: int = 250) -> None:
    """Train a model in place, on examples generated as it goes.

    Args:
        model: The model to train.
        steps: The number of updates.
        seed: The seed of the training data.
        every: How often to report progress, in steps.
    """
    rng = random.Random(f"pretraining:{seed}")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(steps))
    start = time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        losses = []
        for part in training_batches(rng):
            loss = batch_loss(model, part)
            (loss * (len(part) / BATCH_SIZE)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        if step % every == 0:
            seen = coded_accuracy(model, PRETRAINING, per_triple=4)
            held_out = coded_accuracy(model, held_out_triples(), per_triple=10)
            shown = " ".join(f"{value:.3f}" for value in losses)
            print(
                f"step {step}  loss {shown}  seen {seen:.3f}  held-out {held_out:.3f}"
                f"  {time.monotonic() - start:.0f} s",
                flush=True,
            )


def held_out_triples() -> list[Skills]:
    """List the compositions that pretraining leaves out."""
    return [task.skills for task in TASKS if task.role == "held-out"]


@torch.no_grad()
def exact_match(model: T5ForConditionalGeneration, examples: Sequence[Example]) -> float:
    """Measure the share of examples a model answers exactly, by greedy generation."""
    model.eval()  # type: ignore[no-untyped-call]
    correct = 0
    for start in range(0, len(examples), BATCH_SIZE):
        batch = examples[start : start + BATCH_SIZE]
        inputs = encode([text for text, _ in batch], PAD)
        outputs: Any = model.generate(  # type: ignore[misc]
            input_ids=inputs, attention_mask=(inputs != PAD).long(), do_sample=False
        )
        for row, (_, target) in zip(outputs.tolist(), batch, strict=True):
            produced = bytes(token - BYTE_OFFSET for token in row if token >= BYTE_OFFSET)
            correct += produced == target.encode()
    model.train()
    return correct / len(examples)


def coded_accuracy(
    model: T5ForConditionalGeneration,
    triples: Sequence[Skills],
    per_triple: int = EVALUATION_PER_TRIPLE,
) -> float:
    """Measure exact match when the control code names every skill."""
    rng = random.Random("evaluation")
    return exact_match(
        model,
        [
            make_example(skills, control_code(skills), rng)
            for skills in triples
            for _ in range(per_triple)
        ],
    )


def instructed_accuracy(model: T5ForConditionalGeneration) -> float:
    """Measure exact match on the instructions of the demo, which the base cannot know."""
    rng = random.Random("evaluation")
    return exact_match(
        model,
        [
            make_example(task.skills, task.instruction, rng)
            for task in TASKS
            for _ in range(EVALUATION_PER_TRIPLE)
        ],
    )


def main() -> None:
    """Train the base, save it, and print its accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder to save to")
    parser.add_argument("--steps", type=int, default=4000, help="number of updates")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the data")
    options = parser.parse_args()

    torch.set_num_threads(2)
    torch.manual_seed(options.seed)
    model = new_model()
    print(f"{model.num_parameters():,} parameters", flush=True)
    train(model, options.steps, options.seed)
    model.save_pretrained(options.out)
    ByT5Tokenizer(extra_ids=0).save_pretrained(options.out)
    print(f"coded, seen in pretraining: {coded_accuracy(model, PRETRAINING):.4f}")
    print(f"coded, held out:            {coded_accuracy(model, held_out_triples()):.4f}")
    print(f"instructions of the demo:   {instructed_accuracy(model):.4f}")


if __name__ == "__main__":
    main()
