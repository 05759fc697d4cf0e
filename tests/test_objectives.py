"""What kinds learn by: the terms of a loss, alone, in models, side by side, in the program."""

import json
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from base_models import (
    EXAMPLES,
    Maker,
    Routed,
    as_rows,
    bert,
    columns,
    gpt2,
    llama,
    made,
    t5,
    text_model,
)
from torch import Tensor, nn
from torch.testing import assert_close

import polyroute.adapting.loop
import polyroute.adapting.memory
import polyroute.adapting.slot_training
from polyroute import MHRConfig, RoutedModel, adapt_many, attach
from polyroute.errors import InputError
from polyroute.kinds.batches import IGNORED, choice_index, choice_labels, flat_choices, padded
from polyroute.kinds.choose import ModelKind, kind_of
from polyroute.kinds.objectives import (
    OBJECTIVES,
    Objective,
    objective_of,
    term_weights,
    unlikely_constant,
)
from polyroute.kinds.predictions import Predictions
from polyroute.program.cli.app import main
from polyroute.study.examples import encoded_records

ODD = Objective(
    mc_weight=0.7, unlikely_weight=1.3, length_norm=0.5, label_smoothing=0.2, per="example"
)
objectives = pytest.mark.parametrize("objective", ["lm", "superni", "t-few", ODD], ids=str)


def total(objective: Objective, losses_BT: Tensor, rows: list[dict[str, Any]]) -> Tensor:
    """The loss of a batch, from the terms of its rows."""
    weights = term_weights([objective.row_counts(row) for row in rows])
    return sum(w * term for w, term in zip(weights, losses_BT.sum(0), strict=True))


# The terms


def hand_rows() -> tuple[list[dict[str, Any]], Tensor]:
    """Two rows of three choices, and logits under which each token has a probability we know."""
    halvings = [[[1, 2], [2], [1, 3, 1]], [[1], [3, 2], [2, 2]]]  # a 3 is a probability of 1/8
    rows = [
        {"choice_ids": [[5] * len(c) for c in row], "label": label}
        for row, label in zip(halvings, (0, 2), strict=True)
    ]
    logits = torch.zeros(6, 3, 8, dtype=torch.float64)
    for n, choice in enumerate([choice for row in halvings for choice in row]):
        for t, halving in enumerate(choice):
            p = 0.5**halving
            logits[n, t] = log((1 - p) / 7)
            logits[n, t, 5] = log(p)
    return rows, logits + 3.0  # a constant changes no probability


def test_the_t_few_loss_is_what_a_hand_computes() -> None:
    rows, logits = hand_rows()
    objective = OBJECTIVES["t-few"]
    losses = objective.choice_losses(
        Predictions.of(logits, flat_choices(rows)), choice_index(rows), choice_labels(rows)
    )
    lm, mc, ul = (losses.sum(0) * torch.tensor(term_weights(
        [objective.row_counts(row) for row in rows]
    ), dtype=torch.float64)).tolist()  # fmt: skip
    assert lm == pytest.approx((3 + 4) * log(2) / (2 + 2), rel=1e-12)
    first = -log(2**-1.5 / (2**-1.5 + 2**-2 + 2 ** (-5 / 3)))
    second = -log(2**-2 / (2**-1 + 2**-2.5 + 2**-2))
    assert mc == pytest.approx((first + second) / 2, rel=1e-12)
    # Of the wrong choices' tokens two have probability 1/4, three 1/2 and two 1/8.
    wrong = 2 * log(0.76) + 3 * log(0.51) + 2 * log(0.885)
    assert ul == pytest.approx(-wrong / 7, rel=1e-12)
    # Of 6 x 3 places, 7 are tokens of a wrong choice.
    assert unlikely_constant(rows) == pytest.approx(-11 * log(1.01) / 7, rel=1e-12)


def slow(objective: Objective, rows: list[dict[str, Any]], logits: list[list[Tensor]]) -> Tensor:
    """The loss by loops; `logits[b][c]` are those of a choice or of the target, not padded."""
    target, mc, ul = torch.zeros(3, dtype=logits[0][0].dtype).unbind()
    targets, wrong = 0, 0
    for row, choices in zip(rows, logits, strict=True):
        answers = row["choice_ids"] if objective.uses_choices else [row["target_ids"]]
        right = row["label"] if objective.uses_choices else 0
        scores = []
        for c, (ids, values) in enumerate(zip(answers, choices, strict=True)):
            score = 0.0
            for token, value in zip(ids, values, strict=True):
                logs = value - value.exp().sum().log()
                score = score + logs[token] / len(ids) ** objective.length_norm
                if c == right:
                    share = objective.label_smoothing
                    target = target - (1 - share) * logs[token] - share * logs.sum() / len(logs)
                    targets += 1
                else:
                    ul = ul - (1 - logs[token].exp() + 0.01).log()
                    wrong += 1
            scores.append(score)
        if objective.uses_choices:
            all_scores = torch.stack(scores)
            mc = mc - all_scores[right] + all_scores.exp().sum().log()
    loss = target / (len(rows) if objective.per == "example" else targets)
    if objective.uses_choices:
        loss = loss + objective.mc_weight * mc / len(rows)
        loss = loss + objective.unlikely_weight * ul / max(1, wrong)
    return loss


@objectives
def test_the_terms_and_their_gradients_equal_slow_loops(objective: str | Objective) -> None:
    objective = objective_of(objective)
    generator = torch.Generator().manual_seed(0)
    lengths = [[2, 1, 4], [3], [1, 5, 2, 2], [4, 1]]  # one row has a single choice
    rows = [
        {
            "choice_ids": [torch.randint(9, (n,), generator=generator).tolist() for n in row],
            "label": label,
        }
        for row, label in zip(lengths, (1, 0, 3, 0), strict=True)
    ]
    for row in rows:
        row["target_ids"] = row["choice_ids"][row["label"]]
    labels = padded([row["target_ids"] for row in rows], IGNORED)
    if objective.uses_choices:
        labels = flat_choices(rows)
    logits = torch.randn(*labels.shape, 9, generator=generator, dtype=torch.float64) * 3
    logits.requires_grad_()
    if objective.uses_choices:
        losses = objective.choice_losses(
            Predictions.of(logits, labels), choice_index(rows), choice_labels(rows)
        )
    else:
        losses = objective.target_losses(Predictions.of(logits, labels))
    cut = [value[row != IGNORED] for value, row in zip(logits, labels, strict=True)]
    counts = [len(row) if objective.uses_choices else 1 for row in lengths]
    each = iter(cut)
    expected = slow(objective, rows, [[next(each) for _ in range(n)] for n in counts])
    loss = total(objective, losses, rows)
    assert_close(loss, expected)
    assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


@pytest.mark.parametrize("bad", [0, 1])
def test_what_is_not_finite_in_one_row_stays_there(bad: int) -> None:
    rows, logits = hand_rows()
    rows[1] = {"choice_ids": rows[1]["choice_ids"][:2], "label": 1}
    logits = logits[:5].clone()
    of_row = torch.tensor([0, 0, 0, 1, 1])
    logits[of_row == bad] = torch.nan
    logits.requires_grad_()
    losses = OBJECTIVES["t-few"].choice_losses(
        Predictions.of(logits, flat_choices(rows)), choice_index(rows), choice_labels(rows)
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert losses[1 - bad].isfinite().all()
    assert gradient[of_row != bad].isfinite().all()


# Through models


def with_objective(make: Maker, objective: str | Objective) -> tuple[Routed, ModelKind]:
    model, kind = made(make)
    return model, kind_of(model, kind.tokenizer, objective=objective)


def answer_logits(model: Routed, prompt: list[int], answer: list[int]) -> Tensor:
    """Logits of an answer, alone and without padding."""
    if model.base_model.config.is_encoder_decoder:
        shifted = torch.tensor([[0, *answer[:-1]]])
        prompt_ids = torch.tensor([prompt])
        return model.base_model(input_ids=prompt_ids, decoder_input_ids=shifted).logits[0]
    ids = torch.tensor([prompt + answer])
    return model.base_model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


@text_model
@objectives
def test_the_loss_of_a_model_and_its_gradients_equal_slow_loops(
    make: Maker, objective: str | Objective
) -> None:
    model, kind = with_objective(make, objective)
    rows = as_rows(kind.encode(EXAMPLES))  # of 3, 2, 4 and 2 choices
    logits = [
        [
            answer_logits(model, row["prompt_ids"], answer)
            for answer in (row["choice_ids"] if kind.needs_choices else [row["target_ids"]])
        ]
        for row in rows
    ]
    expected = slow(kind.objective, rows, logits)
    loss = kind.loss(model, kind.collate(rows))
    assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    actual, slowly = (
        torch.autograd.grad(value, trained, allow_unused=True, materialize_grads=True)
        for value in (loss, expected)
    )
    for ours, theirs in zip(actual, slowly, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * theirs.abs().max().item() + 1e-6)


@text_model
@objectives
def test_the_terms_of_a_row_do_not_depend_on_its_batch(
    make: Maker, objective: str | Objective
) -> None:
    model, kind = with_objective(make, objective)
    rows = as_rows(kind.encode(EXAMPLES))
    together = kind.row_losses(model, kind.collate(rows))
    backwards = kind.row_losses(model, kind.collate(rows[::-1]))
    alone = torch.cat([kind.row_losses(model, kind.collate([row])) for row in rows])
    assert together.shape == (4, len(kind.row_counts(rows)[0]))
    assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert_close(backwards.flip(0), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [t5, llama])
def test_a_prompt_is_encoded_once_and_every_choice_has_the_task_of_its_row(make: Maker) -> None:
    model, kind = with_objective(make, "t-few")
    kind.loss(model, kind.collate(as_rows(kind.encode(EXAMPLES))))
    flat = ["where"] * 3 + ["truth"] * 2 + ["count"] * 4 + ["truth"] * 2
    assert model.seen == ([EXAMPLES["task"], flat] if make is t5 else [flat])


@text_model
def test_plain_cross_entropy_is_the_models_own_loss(make: Maker) -> None:
    model, kind = with_objective(make, "lm")
    batch = kind.collate(as_rows(kind.encode(EXAMPLES)))
    tasks = {"input_ids", "attention_mask", "labels", "tasks"}
    assert set(batch) == tasks
    tensors = {name: value for name, value in batch.items() if name != "tasks"}
    # The output head runs on labelled tokens alone, which rounds differently.
    assert_close(kind.loss(model, batch), model.base_model(**tensors).loss)


# Side by side


def answers(task: str, number: int = 7) -> list[dict[str, Any]]:
    """Examples of 2, 3 and 4 choices, with prompts and choices of unequal length."""
    choices = ["yes", "no", "a big red dog", "maybe two"]
    words = ["cat", "the dog ran", task, "a mat is on the big mat"]
    return [
        {
            "input": " ".join(words[: 1 + i % 4]),
            "target": choices[i % 2],
            "choices": choices[: 2 + i % 3],
        }
        for i in range(number)
    ]


def routed(make: Maker, objective: str | Objective) -> tuple[RoutedModel, ModelKind]:
    torch.manual_seed(0)
    base, tokenizer = make()
    model = attach(
        base, MHRConfig(num_skills=3, num_heads=2, rank=2, alpha=3.0), ["first", "second"]
    )
    with torch.no_grad():
        for parameter in [*model.inventory.parameters(), *model.routes.parameters()]:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, kind_of(base, tokenizer, max_input=16, max_target=16, objective=objective)


@pytest.mark.parametrize(
    ("make", "objective"),
    [(t5, "t-few"), (t5, "superni"), (t5, ODD), (llama, "t-few"), (gpt2, "superni")],
)
def test_every_slot_ends_where_a_loop_over_the_loss_ends(
    make: Maker, objective: str | Objective, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Few tokens at a time: a slot's rows are in several batches, and each beside another slot's.
    monkeypatch.setattr(polyroute.adapting.memory, "CPU_ACTIVATION", 16 * 120)
    model, kind = routed(make, objective)
    given = {"new": answers("new"), "other": answers("other", 5)}
    results = adapt_many(
        model, given, kind=kind, phase="full", steps=3, batch_size=7, optimizer="sgd", lr=0.1,
        route_lr=1.0, warmup=0.0,
    )  # fmt: skip
    for result in results:
        alone, _ = routed(make, objective)
        alone.add_task(result.task)
        alone.keep_tasks([result.task])
        alone.routes.redraw(0, result.seed)
        alone.set_phase("full")
        alone.eval()
        optimizer = torch.optim.SGD(alone.param_groups(lr=0.1, route_lr=1.0, weight_decay=0.0))
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        batch = kind.collate(encoded_records(given[result.task], result.task, kind))
        losses = []
        for step in range(3):
            loss = kind.loss(alone, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            for group, rate in zip(optimizer.param_groups, (0.1, 1.0), strict=True):
                group["lr"] = rate * (3 - step) / 3
            optimizer.step()
            losses.append(loss.item())
        assert [result.first_loss, result.last_loss] == pytest.approx(losses[::2], rel=1e-5)
        assert losses[2] < losses[0]
        for ours, theirs in zip(result.factors, alone.factors_of(result.task), strict=True):
            for tensor, expected in zip(vars(ours).values(), vars(theirs).values(), strict=True):
                assert_close(tensor, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [t5, llama])
def test_choices_count_in_the_size_of_a_batch(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model, kind = routed(make, "t-few")
    sizes: list[tuple[int, int]] = []
    losses = kind.row_losses

    def noted(model: Any, batch: Any) -> Tensor:
        width = batch["input_ids"].shape[1] + (batch["labels"].shape[1] if make is t5 else 0)
        sizes.append((len(batch["gold"]), len(batch["labels"]) * width))
        return losses(model, batch)

    monkeypatch.setattr(kind, "row_losses", noted)
    monkeypatch.setattr(polyroute.adapting.memory, "CPU_ACTIVATION", 16 * 300)
    adapt_many(model, {"a": answers("a"), "b": answers("b")}, kind=kind, phase="z", steps=1)
    assert all(rows == 1 or size <= 300 for rows, size in sizes)
    assert max(rows for rows, _ in sizes) > 1
    assert sum(rows for rows, _ in sizes) == 14 + 2  # one of each slot is looked at in the end


def test_a_saved_slot_is_not_taken_up_under_another_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polyroute.adapting.loop, "SECONDS_BETWEEN_SAVES", 0.0)
    monkeypatch.setattr(polyroute.adapting.slot_training.SlotTraining, "finish", lambda self: 1 / 0)
    model, kind = routed(t5, "t-few")
    options: dict[str, Any] = {"phase": "z", "steps": 2, "folder": tmp_path}
    with pytest.raises(ZeroDivisionError):
        adapt_many(model, {"a": answers("a")}, kind=kind, **options)
    other = kind_of(model, kind.tokenizer, max_input=16, max_target=16)
    with pytest.raises(InputError, match="was written for another objective"):
        adapt_many(model, {"a": answers("a")}, kind=other, **options)


# In the program


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training tasks, one of them without choices, and one held out."""
    folder = tmp_path_factory.mktemp("objectives")
    (folder / "suite").mkdir()
    roles = {}
    for name, choices in (("free", None), ("known", ["yes", "no"]), ("new", ["no", "yes", "cat"])):
        records = [
            {"instruction": "", "input": f"{i} is odd", "target": ("no", "yes")[i % 2],
             "choices": choices, "split": ("train", "train", "test")[i // 4 % 3]}
            for i in range(24)
        ]  # fmt: skip
        lines = "\n".join(map(json.dumps, records))
        (folder / "suite" / f"{name}.jsonl").write_text(lines + "\n")
        roles[name] = {
            "category": "toy", "choices": choices is not None,
            "metric": "accuracy" if choices else "exact_match",
            "role": "held-out" if name == "new" else "train",
        }  # fmt: skip
    (folder / "suite" / "roles.json").write_text(json.dumps(roles))
    return folder


def train(place: Path, out: str, *extra: str) -> None:
    main(
        ["train", "--model", "demo", "--data", str(place / "suite"), "--out", str(place / out),
         "--skills", "2", "--heads", "2", "--rank", "2", "--steps", "2", "--batch-size", "4",
         "--max-input", "16", "--max-target", "8", *extra]
    )  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], function: Any, *arguments: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_the_program_trains_and_adapts_by_an_objective(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(place, "run", "--objective", "t-few")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "left out 1 tasks without choices: the objective compares them" in said
    recorded = json.loads((place / "run" / "run.json").read_text())["config"]
    assert recorded["objective"] == "t-few"
    assert recorded["tasks"] == ["known"]
    error = refused(capsys, train, place, "run", "--objective", "superni", "--resume")
    assert "started with objective='t-few', not 'superni'" in error
    arguments = [
        "adapt", str(place / "run"), "--data", str(place / "suite"), "--shots", "8", "--steps",
        "6", "--seeds", "0", "--lr", "0.02", "--objective",
    ]  # fmt: skip
    found = {}
    for name in ("t-few", "superni"):
        main([*arguments, name, "--out", str(place / name)])
        (found[name],) = json.loads((place / name / "results.json").read_text())
        assert found[name]["last_loss"] < found[name]["first_loss"]
    assert len({result["first_loss"] for result in found.values()}) == 2
    assert json.loads((place / "t-few" / "run.json").read_text())["config"]["objective"] == "t-few"


def test_the_program_names_what_an_objective_cannot_use(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, train, place, "bad", "--objective", "t-few", "--tasks", "free")
    assert "task 'free' has no choices, and the objective compares them: leave the task" in error
    error = refused(capsys, train, place, "bad", "--objective", "tfew")
    assert "unknown objective 'tfew': did you mean 't-few'?" in error
    assert not (place / "bad").exists()


# Wrong input


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mc_weight": -1}, "mc_weight must not be negative, not -1"),
        ({"unlikely_weight": float("nan")}, "unlikely_weight must be a finite number"),
        ({"length_norm": float("inf")}, "length_norm must be a finite number"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), not 1.0"),
        ({"label_smoothing": "0.1"}, "label_smoothing must be a finite number, not '0.1'"),
        ({"mc_weight": True}, "mc_weight must be a finite number"),
        ({"per": "batch"}, "per='batch' is not one of 'token', 'example'"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        Objective(**values)


@pytest.mark.parametrize("name", ["tfew", 3])
def test_an_unknown_objective_is_named(name: Any) -> None:
    with pytest.raises(InputError, match=f"unknown objective {name!r}: "):
        kind_of(made(t5)[0], made(t5)[1].tokenizer, objective=name)


@pytest.mark.parametrize("objective", ["t-few", "superni"])
def test_an_encoder_has_no_other_objective(objective: str) -> None:
    with pytest.raises(InputError, match=f"always learns by comparing .* objective '{objective}'"):
        with_objective(bert, objective)


@text_model
def test_choices_can_only_be_compared_where_there_are_some(make: Maker) -> None:
    _, kind = with_objective(make, "t-few")
    free = as_rows(kind.encode(columns(("free", "", "cat", "dog", None))))
    with pytest.raises(InputError, match=r"task 'free' has a row without choices: use .* 'lm'"):
        kind.collate(free)
    off = as_rows(kind.encode(columns(("odd", "", "cat", "dog", ["yes", "no"]))))
    with pytest.raises(InputError, match="task 'odd' is not one of its choices: add it"):
        kind.collate(off)


def test_adapting_refuses_examples_without_choices_before_it_trains() -> None:
    model, kind = routed(t5, "t-few")
    free = [{"input": "cat", "target": "dog"}]
    with pytest.raises(InputError, match="task 'b' has a row without choices"):
        adapt_many(model, {"a": answers("a"), "b": free}, kind=kind)
