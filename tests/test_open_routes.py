"""A route belongs to its block: coroutines, generators and threads have their own."""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import torch
from models import llama, routed, stack, t5
from torch import Tensor, nn

from polyroute import InputError, RoutedModel
from polyroute.layer.open_route import _open_blocks

X = torch.linspace(-1, 1, 8).view(1, 8)


def attached() -> tuple[Any, Callable[[Any], Any], Callable[[], Tensor]]:
    model = routed(stack(), num_heads=2, rank=2, alpha=5.0)
    return model, model.route, lambda: model(X)


def in_peft() -> tuple[Any, Callable[[Any], Any], Callable[[], Tensor]]:
    peft = pytest.importorskip("peft")
    from polyroute import peft as pp

    config = pp.MHRConfig(tasks=["amber", "birch", "cedar"], num_heads=2, num_skills=3, rank=2)
    config.target_modules = {"up", "down", "again"}
    model = peft.get_peft_model(stack(), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mhr_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model, lambda tasks: pp.route(model, tasks), lambda: model(X)


@pytest.fixture(params=[attached, in_peft], ids=["attach", "peft"])
def routing(request: pytest.FixtureRequest) -> Any:
    _, route, run = request.param()
    truth = {}
    for task in ("amber", "birch", "cedar", "mu", None):
        with route(task):
            truth[task] = run()
    values = list(truth.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    yield route, run, truth
    with pytest.raises(InputError, match="no task is routed"):
        run()
    assert not any(block.is_open for block in _open_blocks.get())


def test_generators_that_take_turns_have_their_own_tasks(routing: Any) -> None:
    route, run, truth = routing

    def stream(task: str) -> Iterator[Tensor]:
        with route(task):
            while True:
                yield run()

    one, two, three = stream("amber"), stream("birch"), stream("amber")
    for _ in range(2):
        assert torch.equal(next(one), truth["amber"])
        assert torch.equal(next(two), truth["birch"])
        assert torch.equal(next(three), truth["amber"])
    with pytest.raises(InputError, match="no task is routed"):
        run()  # which is in no block, whoever else has one open
    one.close()
    assert torch.equal(next(two), truth["birch"])
    with route("cedar"):
        assert torch.equal(run(), truth["cedar"])
        assert torch.equal(next(two), truth["birch"])
        assert torch.equal(run(), truth["cedar"])
        three.close()
        assert torch.equal(run(), truth["cedar"])
    two.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (2, 0, 1)])
def test_blocks_may_end_in_any_order(routing: Any, order: tuple[int, ...]) -> None:
    route, run, truth = routing
    tasks = ["amber", "birch", "cedar"]

    def stream(task: str) -> Iterator[Tensor]:
        with route(task):
            while True:
                yield run()

    streams = [stream(task) for task in tasks]
    for one, task in zip(streams, tasks, strict=True):
        assert torch.equal(next(one), truth[task])
    for place in order:
        streams[place].close()
        for other in set(range(3)) - set(order[: order.index(place) + 1]):
            assert torch.equal(next(streams[other]), truth[tasks[other]])


def test_an_abandoned_generator_leaves_nothing_open(routing: Any) -> None:
    route, run, truth = routing

    def stream() -> Iterator[Tensor]:
        with route("amber"):
            yield run()
            yield run()

    assert torch.equal(next(stream()), truth["amber"])
    gc.collect()


def test_coroutines_of_one_loop_have_their_own_tasks(routing: Any) -> None:
    route, run, truth = routing

    async def work(task: str) -> None:
        with route(task):
            for _ in range(3):
                await asyncio.sleep(0)
                assert torch.equal(run(), truth[task])

    async def together() -> None:
        await asyncio.gather(*(work(task) for task in ("amber", "birch", "cedar", "amber")))

    asyncio.run(together())


def test_coroutines_driven_by_hand_have_their_own_tasks(routing: Any) -> None:
    route, run, truth = routing

    class Turn:
        def __await__(self) -> Iterator[None]:
            yield

    async def work(task: str) -> None:
        for _ in range(2):
            with route(task):
                await Turn()
                assert torch.equal(run(), truth[task])

    waiting = [work(task) for task in ("amber", "birch", "cedar")]
    while waiting:
        for one in list(waiting):
            try:
                one.send(None)
            except StopIteration:
                waiting.remove(one)


def test_what_a_block_starts_is_in_it(routing: Any) -> None:
    route, run, truth = routing

    async def inside() -> Tensor:
        await asyncio.sleep(0)
        return run()

    async def main() -> None:
        with route("birch"):
            found = await asyncio.gather(inside(), inside(), asyncio.to_thread(run))
        assert all(torch.equal(one, truth["birch"]) for one in found)

    asyncio.run(main())


def test_functions_that_open_a_block_for_their_caller_may_do_so(routing: Any) -> None:
    route, run, truth = routing

    @contextmanager
    def opened(task: str) -> Iterator[None]:
        with route(task):
            yield

    @asynccontextmanager
    async def opened_later(task: str) -> Any:
        with route(task):
            yield

    async def main() -> None:
        async with opened_later("cedar"):
            assert torch.equal(run(), truth["cedar"])
            with opened("amber"):
                assert torch.equal(run(), truth["amber"])
            assert torch.equal(run(), truth["cedar"])

    with opened("amber"), ExitStack() as blocks:
        assert torch.equal(run(), truth["amber"])
        blocks.enter_context(route("birch"))
        assert torch.equal(run(), truth["birch"])
        blocks.enter_context(opened("cedar"))
        assert torch.equal(run(), truth["cedar"])
        blocks.close()
        assert torch.equal(run(), truth["amber"])
    asyncio.run(main())


def test_a_block_opened_by_a_function_that_has_returned_holds(routing: Any) -> None:
    route, run, truth = routing

    def start() -> Any:
        block = route("amber")
        block.__enter__()
        return block

    block = start()
    assert torch.equal(run(), truth["amber"])
    with route("birch"):
        assert torch.equal(run(), truth["birch"])
    assert torch.equal(run(), truth["amber"])
    block.__exit__(None, None, None)


def test_blocks_nest_and_close_after_an_error(routing: Any) -> None:
    route, run, truth = routing

    def fail() -> None:
        with route("amber"), route(None):
            assert torch.equal(run(), truth[None])
            with route("mu"):
                assert torch.equal(run(), truth["mu"])
                raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail()


def test_threads_do_not_see_the_blocks_of_each_other(routing: Any) -> None:
    route, run, truth = routing
    found: list[bool] = []
    barrier = threading.Barrier(3)

    def work(task: str) -> None:
        with route(task):
            barrier.wait()
            found.extend(torch.equal(run(), truth[task]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(t,)) for t in ("amber", "birch", "cedar")]
    with route("mu"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 60


def test_one_block_can_be_entered_again_also_inside_itself() -> None:
    model = routed(stack(), num_heads=2)
    block = model.route("amber")
    with block:
        with block:
            inner = model(X)
        assert torch.equal(model(X), inner)
    with block:
        assert torch.equal(model(X), inner)
    with pytest.raises(InputError, match="no task is routed"):
        model(X)


def test_parts_of_a_model_called_alone_follow_the_block_that_they_are_in() -> None:
    model = routed(t5(), num_heads=4)
    ids = torch.tensor([[5, 6, 7, 1]])

    def encoded(task: str) -> Iterator[Tensor]:
        with model.route(task):
            while True:
                yield model.get_encoder()(input_ids=ids).last_hidden_state

    truth = {task: next(encoded(task)) for task in ("amber", "birch")}
    one, two = encoded("amber"), encoded("birch")
    for _ in range(2):
        assert torch.equal(next(one), truth["amber"])
        assert torch.equal(next(two), truth["birch"])
    layer = model.base_model.encoder.block[1].layer[1]
    hidden = torch.randn(1, 4, 32)

    def last_layers(task: str) -> Iterator[Tensor]:
        with model.route(task):
            while True:
                yield layer(hidden)[0]

    alone = {task: next(last_layers(task)) for task in ("amber", "birch")}
    assert not torch.equal(alone["amber"], alone["birch"])
    three, four = last_layers("amber"), last_layers("birch")
    for _ in range(2):  # not the layer by which the encoder begins
        assert torch.equal(next(one), truth["amber"])
        assert torch.equal(next(four), alone["birch"])
        assert torch.equal(next(three), alone["amber"])
        assert torch.equal(next(two), truth["birch"])


def test_streaming_generations_take_turns() -> None:
    model = routed(llama(), num_heads=4)
    prompt = torch.tensor([[5, 6, 7]])

    def tokens(task: str) -> Iterator[int]:
        with model.route(task):
            ids, cache = prompt, None
            while True:
                output = model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)
                yield int(ids)

    def first(task: str, count: int = 6) -> list[int]:
        stream = tokens(task)
        return [next(stream) for _ in range(count)]

    truth = {task: first(task) for task in ("amber", "birch", "dune")}
    assert len({tuple(one) for one in truth.values()}) == 3
    streams = {task: tokens(task) for task in truth}
    found: dict[str, list[int]] = {task: [] for task in truth}
    for _ in range(6):
        for task, stream in streams.items():
            found[task].append(next(stream))
    assert found == truth


def test_two_models_do_not_share_their_blocks() -> None:
    one, two = routed(stack(), num_heads=2, seed=1), routed(stack(), num_heads=2, seed=2)
    with one.route("amber"):
        with pytest.raises(InputError, match="no task is routed"):
            two(X)
        with two.route("birch"):
            assert torch.equal(one(X), one(X, tasks="amber"))
            assert torch.equal(two(X), two(X, tasks="birch"))


def test_a_block_holds_no_frame_alive() -> None:
    model = routed(stack(), num_heads=2)

    class Large:
        pass

    alive: list[Any] = []

    def work() -> None:
        import weakref

        large = Large()
        alive.append(weakref.ref(large))
        with model.route("amber"):
            model(X)

    work()
    assert alive[0]() is None


def test_a_copy_of_a_model_has_routes_of_its_own() -> None:
    import copy

    model = routed(nn.Sequential(nn.Linear(8, 8)), num_heads=2)
    with model.route("amber"):
        twin: RoutedModel = copy.deepcopy(model)
        with pytest.raises(InputError, match="no task is routed"):
            twin(X)
        with twin.route("birch"):
            assert torch.equal(twin(X), model(X, tasks="birch"))


class Opened:
    """A context manager of somebody's own, which opens a block for its caller."""

    def __init__(self, route: Callable[[Any], Any], task: str) -> None:
        self.block = route(task)

    def __enter__(self) -> None:
        self.block.__enter__()

    def __exit__(self, *error: object) -> None:
        self.block.__exit__(*error)


def test_a_block_opened_for_the_caller_is_inside_those_that_the_caller_is_in(routing: Any) -> None:
    route, run, truth = routing
    with route("birch"):
        with Opened(route, "amber"):
            assert torch.equal(run(), truth["amber"])
            with route("cedar"):
                assert torch.equal(run(), truth["cedar"])
            assert torch.equal(run(), truth["amber"])
        assert torch.equal(run(), truth["birch"])
        with ExitStack() as blocks:

            def enter(task: str) -> None:
                blocks.enter_context(route(task))

            enter("amber")
            assert torch.equal(run(), truth["amber"])
            enter("mu")
            assert torch.equal(run(), truth["mu"])
        assert torch.equal(run(), truth["birch"])


def test_a_suspended_coroutine_routes_nobody_else(routing: Any) -> None:
    route, run, truth = routing

    class Turn:
        def __await__(self) -> Iterator[None]:
            yield

    async def work() -> None:
        with route("amber"):
            await Turn()

    waiting = work()
    waiting.send(None)
    with pytest.raises(InputError, match="no task is routed"):
        run()
    with Opened(route, "birch"):
        assert torch.equal(run(), truth["birch"])
    waiting.close()


def test_what_a_generator_starts_elsewhere_is_in_its_block(routing: Any) -> None:
    import contextvars

    route, run, truth = routing

    async def child() -> Tensor:
        await asyncio.sleep(0)
        return run()

    async def serve(task: str) -> Any:
        with route(task):
            yield await asyncio.to_thread(run)
            yield (await asyncio.gather(child()))[0]

    async def main() -> None:
        async for found in serve("amber"):
            assert torch.equal(found, truth["amber"])

    def threaded(task: str) -> Iterator[Tensor]:
        with route(task):
            found: list[Tensor] = []
            context = contextvars.copy_context()
            thread = threading.Thread(target=context.run, args=(lambda: found.append(run()),))
            thread.start()
            thread.join()
            yield found[0]

    asyncio.run(main())
    assert torch.equal(next(threaded("birch")), truth["birch"])
    gc.collect()


def test_a_copy_of_a_part_says_that_it_has_no_routes() -> None:
    import copy

    model = routed(llama(), num_heads=4)
    part = copy.deepcopy(model.base_model.model.layers[0].mlp)
    with pytest.raises(InputError, match="copy the whole routed model"):
        part(torch.randn(1, 3, 32))
