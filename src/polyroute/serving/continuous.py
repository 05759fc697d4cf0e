"""Continuous batching of a decoder-only model: requests of all tasks share every forward.

transformers schedules the requests and keeps their keys and values in pages. What it calls as the
model is `_Batches`, which routes the tokens of each request as its own task and chooses the next
tokens, each as the request wants it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import psutil
import torch
from torch import Tensor

from polyroute.errors import InputError, reason
from polyroute.host.output import say
from polyroute.kinds.choose import ModelKind
from polyroute.model import RoutedModel
from polyroute.serving.answers import Event, Failed, Limits, PromptTold
from polyroute.serving.packed_attention import NAME, PackedRow, can_pack, register
from polyroute.serving.places import Places
from polyroute.serving.requests import ServingError, StoppingError
from polyroute.serving.sampling import NOT_FINITE, Chosen, chosen_tokens, logprobs_of
from polyroute.serving.text_engine import Request, TextEngine

__all__ = ["ContinuousEngine"]

PAGE = 32
"""Tokens in a page of the cache."""
SHARE_OF_MEMORY = 0.25
"""Of the free memory, the most that the cache takes."""


@dataclass(eq=False, kw_only=True)
class _Running(Request):
    """A request in the hands of the scheduler."""

    prompt: list[Chosen] = field(default_factory=list)
    """The tokens of the prompt with their log-probabilities, as far as they are computed."""

    @property
    def wants_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        asked = self.generation
        missing = len(self.prompt) < len(asked.prompt_ids)
        return asked.echo and asked.top_logprobs is not None and missing


class ContinuousEngine(TextEngine[_Running]):
    """Answers requests with a decoder-only model; see `TextEngine`."""

    request_class = _Running

    def __init__(self, model: RoutedModel, kind: ModelKind, places: Places, limits: Limits) -> None:
        super().__init__(model, kind, places, limits)
        self._manager = self._make_manager()

    # ---------------------------------------------------------------- for the service

    def start(self) -> None:
        """Begin to answer; called inside the event loop that asks."""
        super().start()
        self._manager.start()

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        return bool(self._manager.is_running()) and not self.is_stopping

    def load(self) -> dict[str, float]:
        """How many requests there are."""
        processor = self._manager.batch_processor
        active = 0 if processor is None else len(processor.scheduler.active_requests)
        # The scheduler lets go of a request a little after its answer has ended.
        active = min(active, len(self.requests))
        return {"running": active, "waiting": len(self.requests) - active}

    def _begin(self, request: _Running) -> None:
        taken = self._manager.add_request(
            list(request.generation.prompt_ids),
            request_id=request.id,
            max_new_tokens=max(1, request.generation.max_tokens),
            eos_token_id=sorted(self.ends),
        )
        if taken is None:  # its thread ended since
            raise StoppingError

    def _leave(self, request: _Running) -> None:
        # A forward that is running may still have its tokens; nobody sees what that computes.
        self._manager.cancel_request(request.id)

    def _end(self) -> None:
        self._manager.stop(block=True, hard_stop=True)

    # ---------------------------------------------------------------- for the scheduler

    def _make_manager(self) -> Any:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        base = self.model.base_model
        is_packed = can_pack(base)
        most, length = self.limits.most_at_once, self.limits.most_tokens
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=_pages(base, most, length),
            max_batch_tokens=self.limits.most_batch_tokens,
            max_requests_per_batch=most,
            # Equal prompts have different keys and values under different tasks.
            allow_block_sharing=False,
        )
        pad = self.tokenizer.pad_token_id
        greedy = GenerationConfig(  # type: ignore[no-untyped-call]
            do_sample=False, eos_token_id=-1, pad_token_id=0 if pad is None else pad,
            max_new_tokens=length,
        )  # fmt: skip
        make: Any = base.init_continuous_batching
        manager = make(generation_config=greedy, continuous_batching_config=settings)
        if is_packed:
            register()
            base.set_attn_implementation(NAME)  # type: ignore[operator]
        manager.model = _Batches(self, is_packed=is_packed)
        manager.output_router = _Outcomes(self)
        return manager

    def of_batch(self) -> list[tuple[_Running | None, bool]]:
        """The requests of the running forward, and whether each gets a new token.

        A request that was cancelled since the forward was planned is None.
        """
        states = self._manager.batch_processor.inputs_and_outputs.requests_in_batch
        return [(self.requests.get(one.state.request_id), one.has_new_token) for one in states]

    def fail(self, id: str) -> None:
        """Tell a request, by its id, that there is no answer; from the thread of the model."""
        if (running := self.requests.get(id)) is not None:
            # Whoever stops the scheduler makes it give up what it has.
            error = StoppingError() if self.is_stopping else ServingError()
            self.tell([(running, Failed(error))])


class _Batches:
    """What the scheduler calls as the model.

    Args:
        engine: has the requests.
        is_packed: whether attention is `packed_attention`'s.
    """

    def __init__(self, engine: ContinuousEngine, *, is_packed: bool) -> None:
        self._engine, self._is_packed = engine, is_packed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine.model, name)

    def __call__(self, **batch: Any) -> Any:
        """Compute a batch, choose the next tokens, and return logits that choose the same."""
        requests, keeps = self._engine.of_batch(), "logits_to_keep" in batch
        try:
            logits = self._logits(requests, batch)
        except Exception as error:  # the others, and the requests to come, must not suffer
            say(f"serve: a forward failed ({reason(error)})")
            for running, _ in requests:
                if running is not None:
                    self._engine.fail(running.id)
            logits = self._nothing(batch, keeps=keeps)
        return SimpleNamespace(logits=logits)

    @torch.no_grad()
    def _logits(self, requests: Sequence[tuple[_Running | None, bool]], batch: Any) -> Tensor:
        starts = batch["cu_seq_lens_q"].tolist()
        lengths = [after - first for first, after in itertools.pairwise(starts)]
        if self._is_packed:
            (keys,) = batch["cu_seq_lens_k"].values()
            batch["packed_row"] = PackedRow(starts, keys.tolist())
        positions = batch["position_ids"][0]
        for (running, _), first in zip(requests, starts, strict=False):
            if running is not None and running.wants_prompt:
                # A request that gave its pages to others begins anew.
                del running.prompt[int(positions[first]) + 1 :]
        told = [
            (running, first, length)
            for (running, _), first, length in zip(requests, starts, lengths, strict=False)
            if running is not None and running.wants_prompt
        ]
        where = batch.pop("logits_to_keep", None)
        news = [running for running, has_new in requests if has_new]
        last = batch["logits_indices"]
        if where is not None:
            more = [torch.arange(first, first + n, device=last.device) for _, first, n in told]
            batch["logits_to_keep"] = torch.cat([last, *more])
        tasks = [None if running is None else running.held.route for running, _ in requests]
        found = self._engine.model(tasks=tasks, segments=[lengths], **batch).logits
        place = len(last)
        events: list[tuple[_Running, Event]] = []
        for running, first, length in told:
            own = found[0, place : place + length] if where is not None else found[0, first:]
            place += length
            events += _tell_prompt(running, own[:length])
        of_last: Tensor = found[:, : len(last)] if where is not None else found
        rows = torch.arange(len(news)) if where is not None else last[: len(news)]
        self._choose(of_last, rows, news, events)
        self._engine.tell(events)
        return of_last

    def _choose(
        self,
        logits: Tensor,
        rows: Tensor,
        news: Sequence[_Running | None],
        events: list[tuple[_Running, Event]],
    ) -> None:
        """Choose the next token of each request, and make its logit the largest, in place."""
        if not news:
            return
        known = [(i, running) for i, running in enumerate(news) if running is not None]
        own = logits[0, rows.to(logits.device)].float()
        chosen = chosen_tokens(
            own[[i for i, _ in known]],
            [running.generation for _, running in known],
            [running.draws for _, running in known],
        )
        ends = min(self._engine.ends)
        tokens = [ends] * len(news)
        for (i, running), token in zip(known, chosen, strict=True):
            if token.is_finite:
                tokens[i] = token.id
                events.append((running, token))
            else:
                events.append((running, Failed(ServingError(NOT_FINITE))))
        logits[0, rows] = 0.0
        logits[0, rows, torch.tensor(tokens)] = 1.0

    def _nothing(self, batch: Any, *, keeps: bool) -> Tensor:
        """Logits that end every answer."""
        count = len(batch["logits_indices"]) if keeps else batch["input_ids"].shape[1]
        vocabulary: int = self._engine.model.config.get_text_config().vocab_size
        logits = torch.zeros(1, count, vocabulary, device=batch["input_ids"].device)
        logits[..., min(self._engine.ends)] = 1.0
        return logits


class _Outcomes:
    """Takes what the scheduler says of requests; tokens were told already, so only failures count.

    It has the methods of transformers' `OutputRouter`.
    """

    def __init__(self, engine: ContinuousEngine) -> None:
        self._engine = engine

    def deliver(self, output: Any) -> None:
        """Take one outcome."""
        if output.error is not None:
            self._engine.fail(output.request_id)

    def deliver_batch(self, outputs: Sequence[Any]) -> None:
        """Take several."""
        for output in outputs:
            self.deliver(output)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        """Take a request that failed."""
        del error
        self._engine.fail(state.request_id)


def _tell_prompt(running: _Running, logits: Tensor) -> list[tuple[_Running, Event]]:
    """Note the log-probabilities of a part of a prompt; the event once all are known.

    Args:
        running: the request.
        logits: `[L, V]` at the next L tokens of its prompt, each of which predicts the one after.
    """
    ids, top = running.generation.prompt_ids, running.generation.top_logprobs or 0
    if not running.prompt:
        running.prompt.append(Chosen(ids[0]))
    known = len(running.prompt)
    predicted = ids[known : known + len(logits)]
    running.prompt += logprobs_of(logits[: len(predicted)], predicted, top)
    return [] if running.wants_prompt else [(running, PromptTold(running.prompt))]


def _pages(base: Any, most_at_once: int, most_tokens: int) -> int:
    """The number of pages of the cache: for all requests at their longest, if memory allows.

    Raises:
        InputError: memory does not allow even one.
    """
    config = base.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    size = 2 * config.num_hidden_layers * heads * width * base.dtype.itemsize * PAGE
    if base.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(base.device)
    else:
        free = psutil.virtual_memory().available
    of_one = -(-most_tokens // PAGE) + 1
    most = int(SHARE_OF_MEMORY * free // size)
    if most < of_one:
        raise InputError(
            f"there is not enough memory for the keys and values of {most_tokens} tokens: lower "
            "--max-length"
        )
    # The scheduler keeps a part of the pages free before it takes new requests.
    return min(most, round(1.25 * of_one * most_at_once))
