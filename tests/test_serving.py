"""Serving without HTTP: every answer is the one that its request gets alone."""

import asyncio
import random
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from serving_runs import LIMITS, NAMES, alone, base_and_kind, service_of, write_run

import polyroute as pr
from polyroute.errors import InputError
from polyroute.saved.rows import SavedRoutes
from polyroute.serving.requests import (
    BusyError,
    Generation,
    Piece,
    ServingError,
    StoppingError,
    Token,
)
from polyroute.serving.service import ModelService, ServedRun, make_service

EXAMPLES = [{"input": f"word {i}", "target": "yes" if i % 2 else "no"} for i in range(8)]


@dataclass
class Answer:
    """All pieces of an answer, put together."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt: Piece | None = None
    finish: str | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


async def answered(service: ModelService, task: str, prompt: Any, **values: Any) -> Answer:
    ids = service.prompt_ids(prompt) if isinstance(prompt, str) else prompt
    asked = {"max_tokens": 12, "temperature": 0.0, **values}
    whole = Answer()
    async for piece in service.answer(Generation(task=task, prompt_ids=ids, **asked)):
        assert whole.finish is None
        if piece.is_prompt:
            whole.prompt = piece
            continue
        whole.text += piece.text
        whole.tokens += piece.tokens
        whole.finish = piece.finish
    return whole


@asynccontextmanager
async def running(service: ModelService) -> AsyncIterator[ModelService]:
    try:
        await service.start()
        yield service
    finally:
        await asyncio.to_thread(service.stop)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place = tmp_path_factory.mktemp("serving")
    return place, write_run(place / "run")


@pytest.fixture(scope="module")
def folder(written: tuple[Path, Any]) -> Path:
    return written[0]


@pytest.fixture(scope="module")
def model(written: tuple[Path, Any]) -> Any:
    return written[1]


@pytest.fixture(scope="module")
def kind() -> Any:
    return base_and_kind("causal")[1]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 250) for _ in range(draw.randrange(1, 60))] for _ in range(count)]


def test_never_anothers_answer(folder: Path, model: Any, kind: Any, tmp_path: Path) -> None:
    """200 requests of 50 tasks at once, while others are cancelled and tasks come and go."""
    asked = prompts(200)
    tasks = [NAMES[i % 50] if i % 7 else ("mu", "base")[i % 2] for i in range(200)]
    limits = replace(LIMITS, most_requests=400)
    service = service_of(folder / "run", tasks_dir=tmp_path / "tasks", limits=limits)

    async def cancelled(i: int) -> None:
        ids = asked[i]
        given = Generation(task=NAMES[i % 50], prompt_ids=ids, max_tokens=30, temperature=0.0)
        async with aclosing(service.answer(given)) as pieces:
            async for _ in pieces:
                if random.Random(i).random() < 0.5:
                    break

    async def changes() -> None:
        for i in range(4):
            await service.learn(f"new {i}", EXAMPLES, {"steps": 3})
            await service.put_row(f"put {i}", torch.randn(service.tasks.run.shape).tolist())
            await answered(service, f"put {i}", asked[i])
            await service.delete(f"put {i}")
        while any(service.learner.is_learning(f"new {i}") for i in range(4)):
            await asyncio.sleep(0.01)

    async def all_at_once() -> Sequence[Answer]:
        async with running(service):
            others = [asyncio.create_task(cancelled(i)) for i in range(60)]
            others.append(asyncio.create_task(changes()))
            found = await asyncio.gather(
                *(answered(service, task, ids) for task, ids in zip(tasks, asked, strict=True))
            )
            await asyncio.gather(*others)
            assert service.engine.load() == {"running": 0, "waiting": 0}
            return found

    found = asyncio.run(all_at_once())
    for task, ids, answer in zip(tasks, asked, found, strict=True):
        route = None if task == "base" else task
        assert answer.ids == alone(model, kind, ids, route, 12)
    assert len({tuple(answer.ids) for answer in found}) > 100
    assert len(SavedRoutes(tmp_path / "tasks")) == 4
    assert SavedRoutes(folder / "run").names() == NAMES


def serve(folder: Path, ask: Any, **options: Any) -> Any:
    """What a coroutine function finds out about a service."""

    async def work() -> Any:
        async with running(service_of(folder / "run", **options)) as service:
            return await ask(service)

    return asyncio.run(work())


def test_few_places_serve_many_tasks(folder: Path, model: Any, kind: Any) -> None:
    limits = replace(LIMITS, most_requests=3, most_at_once=2)

    async def ask(service: ModelService) -> list[Answer]:
        found = [await answered(service, task, [5, 6, 7]) for task in NAMES]
        assert len(service.engine.places) == 3
        assert len(service.model.tasks) == 3
        return found

    for task, answer in zip(NAMES, serve(folder, ask, limits=limits), strict=True):
        assert answer.ids == alone(model, kind, [5, 6, 7], task, 12)


def test_a_place_that_a_request_holds_is_given_to_no_other(folder: Path, model: Any) -> None:
    places = service_of(folder / "run", limits=replace(LIMITS, most_requests=2)).engine.places
    held = places.hold(NAMES[0])
    for name in NAMES[1:6]:
        other = places.hold(name)
        assert other.route != held.route
        torch.testing.assert_close(places.model.routes[other.route], model.routes[name])
        other.release()
    torch.testing.assert_close(places.model.routes[held.route], model.routes[NAMES[0]])
    last = places.hold(NAMES[7])
    with pytest.raises(BusyError):
        places.hold(NAMES[8])
    last.release()
    held.release()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_request_meets_its_own_keys_alone_on_a_cpu(
    folder: Path, model: Any, kind: Any, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bfloat16 `load_base` chooses eager attention, which trains faster.
    base, own = base_and_kind("causal")
    base.set_attn_implementation(attention)
    served = ServedRun(name="run", run=folder / "run", tasks_dir=None, limits=LIMITS)
    service = make_service(served, base, own)
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def noted(query: Any, key: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[0] * query.shape[2], key.shape[2]))
        return real(query, key, *args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", noted)
    asked = prompts(20)

    async def ask() -> list[Answer]:
        async with running(service):
            pairs = zip(NAMES, asked, strict=False)
            return await asyncio.gather(*(answered(service, *pair) for pair in pairs))

    for task, ids, answer in zip(NAMES, asked, asyncio.run(ask()), strict=False):
        assert answer.ids == alone(model, kind, ids, task, 12)
    longest = max(map(len, asked)) + 12
    assert seen
    assert all(keys <= longest for _, keys in seen)


def test_draws_depend_on_the_seed_alone(folder: Path) -> None:
    async def ask(service: ModelService) -> None:
        drawn = {"temperature": 1.0, "top_p": 0.9}
        first = await answered(service, NAMES[0], [5, 6], seed=3, **drawn)
        many = await asyncio.gather(
            *(answered(service, NAMES[i % 9], [5, 6], seed=3 + i // 9, **drawn) for i in range(27))
        )
        assert many[0].ids == first.ids
        assert len({tuple(one.ids) for one in many[::9]}) > 1
        free = [await answered(service, NAMES[0], [5, 6], **drawn) for _ in range(5)]
        assert len({tuple(one.ids) for one in free}) > 1

    serve(folder, ask)


def test_little_temperature_and_top_p_are_greedy(folder: Path) -> None:
    async def ask(service: ModelService) -> None:
        greedy = await answered(service, NAMES[1], [9, 8, 7])
        for values in ({"temperature": 1e-4}, {"temperature": 1.0, "top_p": 1e-6}):
            assert (await answered(service, NAMES[1], [9, 8, 7], **values)).ids == greedy.ids

    serve(folder, ask)


@torch.no_grad()
def test_log_probabilities_are_those_of_a_forward(folder: Path, model: Any) -> None:
    (ids,) = prompts(1, seed=4)
    ids = ids * 3  # longer than a batch, so the prompt comes in parts

    async def ask(service: ModelService) -> Answer:
        told = answered(service, NAMES[3], ids[:80], top_logprobs=3, echo=True)
        others = (answered(service, NAMES[i], [4, 5, 6]) for i in range(6))
        return (await asyncio.gather(told, *others))[0]

    found = serve(folder, ask)
    assert found.prompt is not None
    told = [*found.prompt.tokens, *found.tokens]
    whole = torch.tensor([[token.id for token in told]])
    assert whole[0, : len(ids[:80])].tolist() == ids[:80]
    logprobs = torch.log_softmax(model(input_ids=whole, tasks=NAMES[3]).logits[0], -1)
    assert told[0].logprob is None
    for place, token in enumerate(told[1:]):
        assert token.logprob == pytest.approx(float(logprobs[place, token.id]), abs=1e-4)
        likeliest = logprobs[place].topk(3).values.tolist()
        assert [value for _, value in token.top] == pytest.approx(likeliest, abs=1e-4)


def test_a_prompt_alone_can_be_scored(folder: Path) -> None:
    async def ask(service: ModelService) -> Answer:
        return await answered(service, "mu", [5, 6, 7], max_tokens=0, echo=True, top_logprobs=1)

    found = serve(folder, ask)
    assert (found.tokens, found.text, found.finish) == ([], "", "length")
    assert len(found.prompt.tokens) == 3

    async def one(service: ModelService) -> Answer:
        return await answered(service, "mu", [5], max_tokens=0, echo=True, top_logprobs=1)

    assert [token.logprob for token in serve(folder, one).prompt.tokens] == [None]


def test_a_stop_text_ends_an_answer_before_it(folder: Path) -> None:
    async def ask(service: ModelService) -> None:
        for task in NAMES:
            whole = await answered(service, task, [5, 6, 7], max_tokens=20)
            if len(whole.text) >= 8:
                break
        for stop in (whole.text[3:6], whole.text[-1:]):
            found = await answered(service, task, [5, 6, 7], max_tokens=20, stop=["none", stop])
            assert found.text == whole.text[: whole.text.index(stop)]
            assert found.finish == "stop"

    serve(folder, ask)


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    async def ask(service: ModelService) -> None:
        with pytest.raises(InputError, match="more than the 96 tokens that the server takes"):
            await answered(service, "mu", [5] * 90, max_tokens=7)
        with pytest.raises(InputError, match="the prompt is empty"):
            await answered(service, "mu", [])
        for token in (-1, 10**6):
            with pytest.raises(InputError, match=f"the prompt has token {token}, and the model"):
                await answered(service, "mu", [5, token])
        with pytest.raises(InputError, match="there is no task 'nobody'"):
            await answered(service, "nobody", [5])
        with pytest.raises(InputError, match="use /v1/completions"):
            await service.embed("mu", ["a"])
        assert service.engine.load() == {"running": 0, "waiting": 0}

    serve(folder, ask)


def test_an_empty_prompt_is_read_as_examples_without_text_are(folder: Path, kind: Any) -> None:
    end = kind.tokenizer.eos_token_id
    service = service_of(folder / "run")
    assert service.prompt_ids("") == [end]
    assert service.prompt_ids("an") == kind.tokenizer("an")["input_ids"]


def test_too_many_requests_are_told_to_wait(folder: Path) -> None:
    async def ask(service: ModelService) -> None:
        outcomes = await asyncio.gather(
            *(answered(service, "mu", [5, 6]) for _ in range(9)), return_exceptions=True
        )
        assert [type(one) for one in outcomes].count(BusyError) == 5
        assert (await answered(service, "mu", [5, 6])).finish

    serve(folder, ask, limits=replace(LIMITS, most_requests=4))


def test_a_stopped_service_takes_nothing(folder: Path) -> None:
    service = service_of(folder / "run")

    async def ask() -> None:
        async with running(service):
            pass
        with pytest.raises(StoppingError):
            await answered(service, "mu", [5])

    asyncio.run(ask())
    assert not service.is_healthy()


@pytest.mark.parametrize("sort", ["causal", "seq2seq"])
def test_a_service_that_stops_ends_all_answers(tmp_path: Path, sort: str) -> None:
    write_run(tmp_path / "run", sort)
    service = service_of(tmp_path / "run", sort, limits=replace(LIMITS, most_at_once=1))

    async def ask() -> None:
        async with running(service):
            asked = [
                asyncio.create_task(
                    answered(service, "mu", [5], max_tokens=40, temperature=1.0, seed=seed)
                )
                for seed in range(4)
            ]
            await asyncio.sleep(0.05)
        done, waiting = await asyncio.wait(asked, timeout=5)
        assert not waiting  # some may have been answered in time, the others were told
        assert {type(one.exception()) for one in done} <= {type(None), StoppingError}
        assert any(one.exception() is not None for one in done)

    asyncio.run(ask())


def test_a_forward_that_fails_spoils_no_other(
    folder: Path, model: Any, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.nn.functional.scaled_dot_product_attention, iter(range(10**6))

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 0:
            raise RuntimeError("out of memory")
        return real(*args, **kwargs)

    async def ask(service: ModelService) -> None:
        monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", sometimes)
        with pytest.raises(ServingError, match="the model failed on this request"):
            await answered(service, NAMES[0], [5, 6, 7])
        found = await answered(service, NAMES[0], [5, 6, 7])
        assert found.ids == alone(model, kind, [5, 6, 7], NAMES[0], 12)
        assert service.is_healthy()

    serve(folder, ask)


def test_numbers_that_are_not_finite_are_no_answer(folder: Path, tmp_path: Path) -> None:
    async def ask(service: ModelService) -> None:
        row = torch.zeros(service.tasks.run.shape)
        await service.put_row("bad", row.tolist())
        with torch.no_grad():
            for parameter in service.model.inventory.parameters():
                parameter.fill_(1e30)
        with pytest.raises(ServingError, match="not finite"):
            await answered(service, "bad", [5])
        assert (await answered(service, "base", [5])).finish

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


# ---------------------------------------------------------------------- tasks


def test_rows_come_and_go_while_it_runs(
    folder: Path, model: Any, kind: Any, tmp_path: Path
) -> None:
    rows = {name: model.routes[name] for name in NAMES}

    async def ask(service: ModelService) -> None:
        assert await service.put_row("mine", rows[NAMES[3]].tolist())
        first = await answered(service, "mine", [5, 6, 7])
        assert first.ids == alone(model, kind, [5, 6, 7], NAMES[3], 12)
        assert not await service.put_row("mine", rows[NAMES[9]].tolist())
        second = await answered(service, "mine", [5, 6, 7])
        assert second.ids == alone(model, kind, [5, 6, 7], NAMES[9], 12)
        assert torch.equal(torch.tensor(service.row("mine")), rows[NAMES[9]])
        assert (await service.nearest("mine", 1))[0][0] == NAMES[9]
        assert "mine" in service.task_names("mi")
        await service.delete("mine")
        assert not service.has_task("mine")
        with pytest.raises(InputError, match="there is no task 'mine'"):
            await answered(service, "mine", [5])

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


@pytest.mark.parametrize(("name", "sentence"), [
    ("base", "the name 'base' is taken"), ("mu", "the name 'mu' is taken"),
    (NAMES[0], "the name 'task 0' is taken"), ("", "task name"), ("a" * 257, "shorten it"),
    ("cafe\u0301", "form NFC"), ("a/row", "in an address"), ("a/mu", "in an address"),
    ("../a", "in an address"), ("a\nb", "U\\+000A"),
])  # fmt: skip
def test_names_that_mean_something_else_are_refused(
    folder: Path, tmp_path: Path, name: str, sentence: str
) -> None:
    async def ask(service: ModelService) -> None:
        row = torch.zeros(service.tasks.run.shape).tolist()
        with pytest.raises(InputError, match=sentence):
            await service.put_row(name, row)
        with pytest.raises(InputError, match=sentence):
            await service.learn(name, EXAMPLES, {"steps": 1})

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


def test_a_task_is_learned_as_adapt_learns_it(folder: Path, kind: Any, tmp_path: Path) -> None:
    async def ask(service: ModelService) -> Any:
        job = await service.learn("new", EXAMPLES, {"steps": 6, "seed": 2})
        assert job["steps"] == 6
        with pytest.raises(InputError, match="is being learned"):
            await service.learn("new", EXAMPLES, {"steps": 6})
        while service.learner.is_learning("new"):
            await asyncio.sleep(0.01)
        job = service.job("new")
        assert (job["status"], job["step"], job["error"]) == ("done", 6, None)
        assert job["loss"] > 0
        with pytest.raises(InputError, match="the name 'new' is taken"):
            await service.learn("new", EXAMPLES, {"steps": 6})
        return service.row("new")

    row = torch.tensor(serve(folder, ask, tasks_dir=tmp_path / "tasks"))
    base, _ = base_and_kind("causal")
    model = pr.from_pretrained(base, folder / "run", tasks=[])
    (expected,) = pr.adapt_many(
        model, {"new": EXAMPLES}, kind=kind, phase="z", seeds=[2], steps=6, batch_size=8
    )
    torch.testing.assert_close(row, expected.route, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("examples", "settings", "sentence"), [
    ([], {}, "examples must be a list"),
    (["text"], {}, "examples must be a list"),
    ([{"input": "a"}], {}, "target"),
    ([{"input": "a" * 500, "target": "b"}], {}, "too long"),
    (EXAMPLES, {"phase": "mu"}, "a server learns rows, in phase 'z'"),
    (EXAMPLES, {"steps": 0}, "steps"),
    (EXAMPLES, {"steps": 10**6}, "at most 1000 steps"),
    (EXAMPLES, {"lr": 1.0}, "'lr' is no setting"),
    (EXAMPLES, {"seed": -1}, "seed must not be negative"),
    ([{"input": "w " * 500, "target": "y"}], {}, "1 of 1 prompts are too long, by up to"),
    ([{"input": "x", "target": "y", "choices": ["y", "z" * 10**5]}], {}, "'choices' of example 0"),
])  # fmt: skip
def test_what_cannot_be_learned_is_refused_at_once(
    folder: Path, tmp_path: Path, examples: Any, settings: Any, sentence: str
) -> None:
    async def ask(service: ModelService) -> None:
        with pytest.raises(InputError, match=sentence):
            await service.learn("new", examples, settings)
        assert service.job("new") is None

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


def test_nobody_writes_a_row_while_its_examples_are_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyroute.serving import learning

    real, began = learning._check_examples, threading.Event()

    def slow(*args: Any) -> None:
        began.set()
        time.sleep(0.3)
        real(*args)

    monkeypatch.setattr(learning, "_check_examples", slow)

    async def ask(service: ModelService) -> None:
        row = torch.zeros(service.tasks.run.shape).tolist()
        learned = asyncio.create_task(service.learn("new", EXAMPLES, {"steps": 1}))
        await asyncio.to_thread(began.wait)
        with pytest.raises(InputError, match="is being learned"):
            await service.put_row("new", row)
        await learned
        while service.learner.is_learning("new"):
            await asyncio.sleep(0.01)
        first = await answered(service, "new", [5, 6, 7])
        with pytest.raises(InputError, match="'new' is taken"):
            await service.learn("new", EXAMPLES, {"steps": 1})
        assert not await service.put_row("new", service.model.routes["place 0"].tolist())
        await service.delete("new")
        assert service.job("new") is None
        assert first.finish

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


def test_a_row_that_is_being_written_is_not_learned_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(service: ModelService) -> None:
        real, began = service.tasks.put, threading.Event()

        def slow(*args: Any) -> bool:
            began.set()
            time.sleep(0.3)
            return real(*args)

        monkeypatch.setattr(service.tasks, "put", slow)
        row = torch.ones(service.tasks.run.shape).tolist()
        written = asyncio.create_task(service.put_row("new", row))
        await asyncio.to_thread(began.wait)
        with pytest.raises(InputError, match="'new' is taken"):
            await service.learn("new", EXAMPLES, {"steps": 1})
        assert await written
        assert service.row("new") == row

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


def test_a_prompt_is_scored_right_though_its_pages_were_taken(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from polyroute.serving import continuous

    monkeypatch.setattr(continuous, "_pages", lambda *_: 5)
    asked = [(ids * 9)[:70] for ids in prompts(16, seed=2)]

    async def ask(service: ModelService) -> list[Answer]:
        return await asyncio.gather(
            *(
                answered(service, NAMES[i], ids, max_tokens=8, echo=True, top_logprobs=1)
                for i, ids in enumerate(asked)
            )
        )

    limits = replace(LIMITS, most_batch_tokens=16)
    for i, found in enumerate(serve(folder, ask, limits=limits)):
        whole = torch.tensor([[*asked[i], *found.ids]])
        with torch.no_grad():
            logprobs = model(input_ids=whole, tasks=NAMES[i]).logits[0].log_softmax(-1)
        told = [token.logprob for token in (*found.prompt.tokens, *found.tokens)][1:]
        own = logprobs[:-1].gather(1, whole[0, 1:, None])[:, 0]
        assert told == pytest.approx(own.tolist(), abs=1e-3)


def test_a_second_server_does_not_take_the_folder(folder: Path, tmp_path: Path) -> None:
    first = service_of(folder / "run", tasks_dir=tmp_path / "tasks")
    with pytest.raises(InputError, match="another server keeps its tasks in"):
        service_of(folder / "run", tasks_dir=tmp_path / "tasks")
    first.tasks.close()
    service_of(folder / "run", tasks_dir=tmp_path / "tasks").tasks.close()


def test_a_disk_that_fails_is_the_servers_fault(folder: Path, tmp_path: Path) -> None:
    async def ask(service: ModelService) -> None:
        row = torch.zeros(service.tasks.run.shape).tolist()
        await service.put_row("mine", row)
        for path in (tmp_path / "tasks").glob("routes-*"):
            path.write_bytes(path.read_bytes()[:40])
        for call in (service.put_row("mine", row), service.nearest("mine", 1)):
            with pytest.raises(ServingError, match="its log says why"):
                await call
        with pytest.raises(ServingError, match="its log says why"):
            service.task_names()
        assert (await answered(service, "mu", [5])).finish

    serve(folder, ask, tasks_dir=tmp_path / "tasks")


def test_without_a_folder_clients_add_nothing(folder: Path) -> None:
    async def ask(service: ModelService) -> None:
        assert not service.can_learn
        with pytest.raises(InputError, match="start it with --tasks-dir FOLDER"):
            await service.put_row("mine", [])

    serve(folder, ask)


def test_tasks_of_another_inventory_are_refused(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "other", rank=3)
    with pytest.raises(InputError, match="holds tasks of another inventory"):
        service_of(folder / "run", tasks_dir=tmp_path / "other")


def test_added_tasks_are_an_inventory_of_their_own(
    folder: Path, model: Any, kind: Any, tmp_path: Path
) -> None:
    async def ask(service: ModelService) -> None:
        await service.put_row("mine", model.routes[NAMES[4]].tolist())

    serve(folder, ask, tasks_dir=tmp_path / "tasks")
    base, _ = base_and_kind("causal")
    reloaded = pr.from_pretrained(base, tmp_path / "tasks").eval()
    assert reloaded.tasks == ("mine",)
    found = alone(reloaded, kind, [5, 6, 7], "mine", 12)
    assert found == alone(model, kind, [5, 6, 7], NAMES[4], 12)

    async def again(service: ModelService) -> list[int]:
        return (await answered(service, "mine", [5, 6, 7])).ids

    assert serve(folder, again, tasks_dir=tmp_path / "tasks") == found


# ---------------------------------------------------------------------- other kinds


@pytest.mark.parametrize("settings", [
    {"method": "private"}, {"method": "shared"}, {"method": "poly", "combine": "output"},
    {"adapter": "ia3"}, {"shared_skill": True},
], ids=str)  # fmt: skip
def test_every_method_is_served(tmp_path: Path, kind: Any, settings: dict[str, Any]) -> None:
    heads = {} if "method" not in settings else {"num_heads": 1}
    skills = {"num_skills": None} if settings.get("method") in ("private", "shared") else {}
    model = write_run(tmp_path / "run", **settings, **heads, **skills)

    async def ask(service: ModelService) -> list[Answer]:
        tasks = [*NAMES[:5], "mu", "base"]
        return await asyncio.gather(*(answered(service, task, [5, 6, 7]) for task in tasks))

    for task, found in zip([*NAMES[:5], "mu", None], serve(tmp_path, ask), strict=True):
        assert found.ids == alone(model, kind, [5, 6, 7], task, 12)


def test_encoder_decoders_answer_in_batches(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", "seq2seq")
    _, own = base_and_kind("seq2seq")
    asked = prompts(40)
    tasks = [*NAMES[:38], "mu", "base"]

    async def ask(service: ModelService) -> list[Answer]:
        return await asyncio.gather(
            *(answered(service, task, ids) for task, ids in zip(tasks, asked, strict=True))
        )

    found = serve(tmp_path, ask, sort="seq2seq")
    for task, ids, answer in zip(tasks, asked, found, strict=True):
        assert answer.ids == alone(model, own, ids, None if task == "base" else task, 12)


def test_a_batch_ends_once_its_requests_are_cancelled(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "seq2seq")

    async def ask(service: ModelService) -> None:
        given = Generation(task="base", prompt_ids=[5], max_tokens=60, temperature=1.0, seed=0)
        async with aclosing(service.answer(given)) as pieces:
            async for _ in pieces:
                break
        with pytest.raises(InputError, match="leave out echo"):
            await answered(service, "base", [5], echo=True)
        assert (await answered(service, "base", [5])).finish
        assert service.engine.load()["waiting"] == 0

    serve(tmp_path, ask, sort="seq2seq")


@torch.no_grad()
def test_encoders_embed(tmp_path: Path) -> None:
    model = write_run(tmp_path / "run", "encoder")
    _, own = base_and_kind("encoder")
    texts = ["one", "two words", "and three words", "x"]

    async def ask(service: ModelService) -> Any:
        assert not service.writes
        with pytest.raises(InputError, match="use /v1/embeddings"):
            await answered(service, "mu", [5])
        with pytest.raises(InputError, match="shorten it"):
            await service.embed("mu", ["long " * 200])
        tasks = [*NAMES[:20], "mu", "base"]
        return tasks, await asyncio.gather(*(service.embed(task, texts) for task in tasks))

    tasks, found = serve(tmp_path, ask, sort="encoder", limits=replace(LIMITS, most_requests=99))
    ids = [own.tokenizer(text)["input_ids"] for text in texts]
    for task, (vectors, count) in zip(tasks, found, strict=True):
        assert count == sum(map(len, ids))
        for own_ids, vector in zip(ids, vectors, strict=True):
            route = [None if task == "base" else task]
            expected = own.embedded(model, own.inputs([own_ids]), route)[0]
            torch.testing.assert_close(torch.tensor(vector), expected, rtol=1e-4, atol=1e-5)


def test_a_service_that_stops_gives_up_all_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", "encoder")
    service = service_of(tmp_path / "run", "encoder", limits=replace(LIMITS, most_at_once=1))

    async def ask() -> None:
        began, real = threading.Event(), service.engine._embed

        def slow(batch: Any) -> Any:
            began.set()
            time.sleep(0.2)
            return real(batch)

        async with running(service):
            monkeypatch.setattr(service.engine, "_embed", slow)
            asked = [asyncio.create_task(service.embed("mu", ["a", "b"])) for _ in range(2)]
            await asyncio.to_thread(began.wait)
        for one in asked:  # one was computed, and the others waited
            with pytest.raises(StoppingError):
                await asyncio.wait_for(one, 5)
        with pytest.raises(StoppingError):
            await service.embed("mu", ["a"])

    asyncio.run(ask())


def test_a_batch_of_texts_that_fails_spoils_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", "encoder")

    async def ask(service: ModelService) -> None:
        def fails(batch: Any) -> Any:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patched:
            patched.setattr(service.engine, "_embed", fails)
            with pytest.raises(ServingError, match="the model failed on this request"):
                await service.embed("mu", ["a", "b"])
        assert len((await service.embed("mu", ["a", "b"]))[0]) == 2
        assert service.engine.load() == {"running": 0, "waiting": 0}

    serve(tmp_path, ask, sort="encoder")


def test_the_rate_counts_the_tokens_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyroute.serving import service

    now = 100.0
    monkeypatch.setattr(service, "time", SimpleNamespace(monotonic=lambda: now))
    rate = service._TokenRate()
    for _ in range(1000):
        now += 1.0
        rate.add(5)
    assert len(rate._told) < 10  # nobody asked, and nothing piled up
    assert rate.now() == pytest.approx(5.0, rel=0.3)
    now += 60.0
    assert rate.now() == 0.0
