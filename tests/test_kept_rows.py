"""Packed rows whose tasks change from forward to forward, and the base model beside tasks."""

import copy
import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import TASKS, batch, gpt2, llama, relative_error, routed, t5
from test_lora_import import llava
from test_packed_rows import packed
from torch import Tensor

import polyroute as pr
from polyroute import InputError, RoutedModel
from polyroute.layer import kernels

ROUTED = [
    {"num_heads": 4, "rank": 2, "alpha": 5.0},
    {"method": "poly", "rank": 3, "alpha": 2.0},
    {"num_heads": 2, "shared_skill": True},
    {"num_heads": 4, "granularity": "coarsegrained"},
]
OTHERS = [
    {"method": "private", "rank": 2, "alpha": 5.0},
    {"method": "shared", "rank": 2},
    {"adapter": "ia3", "num_heads": 2},
    {"method": "poly", "rank": 2, "combine": "output"},
]
Named = list[str | None]
names = st.sampled_from([*TASKS, "mu", None])
lengths = st.integers(1, 30)


def made(model: RoutedModel) -> RoutedModel:
    return model.double().eval()


def alone(model: RoutedModel, ids: Tensor, task: str | None) -> Tensor:
    with model.route(task):
        return model(input_ids=ids).logits


@pytest.fixture(scope="module", params=ROUTED, ids=str)
def model(request: pytest.FixtureRequest) -> RoutedModel:
    return made(routed(llama(), **request.param))


@given(st.lists(st.tuples(names, lengths), min_size=1, max_size=8))
def test_each_example_is_what_it_is_alone(
    model: RoutedModel, examples: list[tuple[str | None, int]]
) -> None:
    torch.manual_seed(len(examples))
    apart = [torch.randint(3, 40, (1, length)) for _, length in examples]
    tasks: Named = [task for task, _ in examples]
    segments = [[length for _, length in examples]]
    with torch.no_grad():
        together = model(**packed(apart), tasks=tasks, segments=segments).logits
        expected = [alone(model, ids, task) for ids, task in zip(apart, tasks, strict=True)]
    torch.testing.assert_close(together, torch.cat(expected, 1), rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_only_new_rows_are_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, mixed = made(routed(llama(), num_heads=4)), []
    real = type(model.mixer).mix_rows

    def noted(self: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        mixed.append([model.tasks[row] if row >= 0 else row for row in rows])
        return real(self, rows, *args, **kwargs)

    monkeypatch.setattr(type(model.mixer), "mix_rows", noted)

    def run(*tasks: str | None) -> list[Any]:
        mixed.clear()
        apart = [torch.full((1, 1), 5 + i) for i in range(len(tasks))]
        found = model(**packed(apart), tasks=list(tasks), segments=[[1] * len(tasks)]).logits
        seen = list(mixed)
        expected = [alone(model, ids, task) for ids, task in zip(apart, tasks, strict=True)]
        torch.testing.assert_close(found, torch.cat(expected, 1), rtol=1e-7, atol=1e-9)
        return seen

    assert run("amber", "birch") == [["amber", "birch"]]
    assert run("birch", "amber", "amber") == []
    assert run("amber", "birch", "cedar") == [["cedar"]]
    assert run("cedar", "dune") == [["dune"]]  # in the place of one that was not used
    assert run("cedar", "dune", "amber", "birch", "mu", None) != []
    assert run("mu", None, "amber") == []
    model.routes["amber"] = 1.0 + model.routes["birch"]
    assert run("amber", "birch") == [["amber"]]


@torch.no_grad()
def test_what_is_kept_follows_a_change_of_skills_and_rows() -> None:
    model = made(routed(gpt2(), num_heads=4))
    apart, tasks = [torch.full((1, 2), 5), torch.full((1, 1), 7)], ["amber", "birch"]

    def found() -> Tensor:
        return model(**packed(apart), tasks=tasks, segments=[[2, 1]]).logits

    before = found()
    model.routes["birch"] = model.routes["amber"] + 3.0 * torch.randn(model.mixer.shape)
    changed = found()
    assert torch.equal(before[:, :2], changed[:, :2])
    assert not torch.allclose(before[:, 2:], changed[:, 2:])
    for parameter in model.inventory.parameters():
        parameter.mul_(1.5)
    expected = [alone(model, ids, task) for ids, task in zip(apart, tasks, strict=True)]
    torch.testing.assert_close(found(), torch.cat(expected, 1), rtol=1e-7, atol=1e-9)


@torch.no_grad()
def test_rows_that_were_kept_by_half_are_mixed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from polyroute.routes import kept_rows

    model = made(routed(llama(), num_heads=4))
    apart = [torch.full((1, 1), 5), torch.full((1, 1), 7), torch.full((1, 1), 9)]

    def run(*tasks: str | None) -> Tensor:
        some = apart[: len(tasks)]
        return model(**packed(some), tasks=list(tasks), segments=[[1] * len(some)]).logits

    run("amber", "birch")
    real, calls = kept_rows._written, iter(range(10**6))

    def sometimes(*given: Any) -> Tensor:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return real(*given)

    monkeypatch.setattr(kept_rows, "_written", sometimes)
    tasks = ("amber", "mu", "cedar")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(*tasks)
    expected = [alone(model, ids, task) for ids, task in zip(apart, tasks, strict=True)]
    torch.testing.assert_close(run(*tasks), torch.cat(expected, 1), rtol=1e-7, atol=1e-9)


def test_gradients_take_the_usual_way() -> None:
    model = made(routed(llama(), num_heads=4))
    inputs = packed([torch.full((1, 2), 5), torch.full((1, 1), 7)])
    model(**inputs, tasks=["amber", "birch"], segments=[[2, 1]]).logits.sum().backward()
    assert all(p.grad is not None for p in model.inventory.parameters())


class TestHalves:
    """Examples of packed rows look kept factors up where a CPU computes in 16 bits."""

    TASKS = ("amber", "birch", "mu", "cedar", None, "birch", "dune", "amber", "cedar", "dune")
    LENGTHS = (
        pytest.param((1,) * 10, id="one token each"),
        pytest.param((1, 7, 1, 2, 1, 30, 1, 1, 5, 3), id="mixed"),
    )

    @pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
    def model(self, request: pytest.FixtureRequest) -> RoutedModel:
        model = routed(llama(), num_heads=4, rank=2, alpha=5.0).to(request.param).eval()
        return model.requires_grad_(False)

    def run(self, model: RoutedModel, tasks: Any, lengths: tuple[int, ...]) -> Tensor:
        torch.manual_seed(1)
        inputs = packed([torch.randint(3, 40, (1, length)) for length in lengths])
        inputs["attention_mask"] = inputs["attention_mask"].to(model.base_model.dtype)
        return model(**inputs, tasks=list(tasks), segments=[list(lengths)]).logits

    def looked_up(self, model: RoutedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Grows by one for each layer whose factors were looked up."""
        seen: list[int] = []
        real = kernels.add_to_few

        def noted(*given: Any) -> Tensor:
            seen.append(len(given))
            return real(*given)

        monkeypatch.setattr(kernels, "add_to_few", noted)
        return seen

    @pytest.mark.parametrize("lengths", LENGTHS)
    @torch.no_grad()
    def test_each_example_is_what_it_is_in_fp32(
        self, model: RoutedModel, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = self.looked_up(model, monkeypatch)
        found = [self.run(model, self.TASKS, lengths)]
        found.append(self.run(model, self.TASKS[::-1], lengths))
        assert len(seen) == 2 * len(model.sites)
        exact = copy.deepcopy(model).float()
        for logits, tasks in zip(found, (self.TASKS, self.TASKS[::-1]), strict=True):
            expected = self.run(exact, tasks, lengths)
            other = self.run(exact, tasks[1:] + tasks[:1], lengths)
            error, of_others = (relative_error(y, expected) for y in (logits.float(), other))
            assert 10 * error < of_others

    @torch.no_grad()
    def test_a_layer_that_is_watched_gets_the_same(
        self, model: RoutedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = self.run(model, self.TASKS, (1,) * 10)
        seen = self.looked_up(model, monkeypatch)
        calls: list[Any] = []
        for site in model.sites:
            site.layer.register_forward_hook(lambda *given: calls.append(given))
        found = self.run(model, self.TASKS, (1,) * 10)
        assert len(calls) == len(model.sites)
        assert not seen
        assert relative_error(found.float(), expected.float()) < 0.03

    @torch.no_grad()
    def test_another_thread_changes_nothing_that_is_being_read(self, model: RoutedModel) -> None:
        ours, others = self.TASKS, (*reversed(self.TASKS[:4]), *(["birch"] * 6))
        expected, of_others = (self.run(model, tasks, (1,) * 10) for tasks in (ours, others))
        found: list[Tensor] = []

        def run() -> None:
            with torch.no_grad():
                found.append(self.run(model, others, (1,) * 10))

        def meanwhile(*_: Any) -> None:
            if not found and threading.current_thread() is threading.main_thread():
                model.routes["birch"] = -3.0 * model.routes["birch"]  # mixed into its old place
                thread = threading.Thread(target=run)
                thread.start()
                thread.join()

        hook = model.base_model.model.layers[0].register_forward_pre_hook(meanwhile)
        assert torch.equal(self.run(model, ours, (1,) * 10), expected)
        hook.remove()
        assert not torch.equal(found[0], of_others)
        assert torch.equal(self.run(model, others, (1,) * 10), found[0])

    @torch.no_grad()
    def test_layers_that_see_images_have_other_vectors_than_tokens(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        modules = ["q_proj", "v_proj", "linear_1"]
        model = routed(llava(), num_heads=4, rank=2, alpha=5.0, target_modules=modules)
        model.to(torch.bfloat16).eval().requires_grad_(False)
        assert any(site.sees_media for site in model.sites)
        ids = torch.randint(3, 60, (10, 6))
        ids[:, 1:5] = 63
        images = torch.randn(10, 3, 8, 8, dtype=torch.bfloat16)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}
        tasks = [*TASKS, *TASKS, "amber", "birch"]
        expected = model(**inputs, tasks=tasks).logits
        seen = self.looked_up(model, monkeypatch)
        found = model(**inputs, tasks=tasks, segments=[[6]] * 10).logits
        assert seen
        assert relative_error(found.float(), expected.float()) < 0.03

    def test_gradients_may_be_wanted_within(self, model: RoutedModel) -> None:
        embeddings = model.base_model.get_input_embeddings().weight.requires_grad_()
        inner = model.base_model.model
        states: list[Tensor] = []
        plain = inner.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.enable_grad():
                found = plain(*args, **kwargs)
                states.append(found.last_hidden_state)
                return found

        inner.forward = forward
        with torch.no_grad():
            self.run(model, self.TASKS, (1,) * 10)
        states[0].float().pow(2).sum().backward()
        assert float(embeddings.grad.abs().sum()) > 0

    def test_with_gradients_nothing_that_may_change_is_looked_up(
        self, model: RoutedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = self.looked_up(model, monkeypatch)
        embeddings = model.base_model.get_input_embeddings().weight.requires_grad_()
        self.run(model, self.TASKS, (1,) * 10).sum().backward()
        expected, embeddings.grad = embeddings.grad, None
        loss = self.run(model, self.TASKS, (1,) * 10).sum()
        assert not seen
        model.routes["amber"] = 5.0 + model.routes["birch"]
        with torch.no_grad():
            self.run(model, ("dune", "amber", *self.TASKS[2:]), (1,) * 10)
        assert seen
        loss.backward()
        assert torch.equal(embeddings.grad, expected)


@pytest.mark.parametrize("settings", [*ROUTED, *OTHERS], ids=str)
@pytest.mark.parametrize("make", [llama, t5])
@torch.no_grad()
def test_the_base_model_shares_a_batch_with_tasks(make: Any, settings: dict[str, Any]) -> None:
    model = made(routed(make(), **settings))
    inputs = batch(model, 4) if make is t5 else {"input_ids": torch.randint(3, 40, (4, 5))}
    for tasks in (["amber", None, "birch", None], [None] * 4, [None, "mu", "amber", "amber"]):
        together = model(**inputs, tasks=tasks).logits
        for i, task in enumerate(tasks):
            own = {name: value[i : i + 1] for name, value in inputs.items()}
            with model.route(task):
                expected = model(**own).logits
            torch.testing.assert_close(together[i : i + 1], expected, rtol=1e-7, atol=1e-9)


def test_a_token_rule_and_the_base_model_share_no_batch() -> None:
    model = pr.attach(llama(), pr.MHRConfig(rank=2), TASKS, rule=TokenRule())
    with pytest.raises(InputError, match="None cannot share a batch with other tasks"):
        model(input_ids=torch.ones(2, 3).long(), tasks=["amber", None])


class TokenRule(pr.RouteRule, name="of short examples"):
    def factors(self, batch: Any, mixer: Any) -> Any:
        raise AssertionError
