"""The HTTP interface of `polyroute serve`, with a service that needs no model."""

import asyncio
import base64
import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import HTTPException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_fake import LIMIT, FakeService, Served, wait_until
from starlette.testclient import TestClient

import polyroute.serving.http.page as page
from polyroute.errors import InputError
from polyroute.serving.http.access import read_api_keys
from polyroute.serving.http.answering import Deadline, until_gone
from polyroute.serving.http.app import make_app
from polyroute.serving.http.bodies import BodyLimit
from polyroute.serving.http.settings import HttpSettings
from polyroute.serving.requests import BusyError, ServingError, StoppingError

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
HELLO = [{"role": "user", "content": "hello"}]
TENANTS = {"key-a": "a/", "key-b": "b/", "key-all": ""}


def openai_client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(api_key="none", base_url=f"{served.url}/v1", max_retries=0)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(FakeService()) as running:
        yield running


@pytest.fixture
def service() -> FakeService:
    return FakeService()


def client_of(service: FakeService, **settings: Any) -> TestClient:
    return TestClient(make_app(service, HttpSettings(**settings)), base_url="http://localhost")


@pytest.fixture
def client(service: FakeService) -> TestClient:
    return client_of(service)


def ask(client: TestClient, url: str = COMPLETIONS, **fields: Any) -> Any:
    body: dict[str, Any] = {"model": "amber"}
    body |= {"messages": HELLO} if url == CHAT else {"prompt": "hi"} if url == COMPLETIONS else {}
    return client.post(url, json={k: v for k, v in (body | fields).items() if v != "leave out"})


def refused(response: Any, status: int, says: str = "") -> dict[str, Any]:
    """The error object of a response, which must have the form that OpenAI's has."""
    assert response.status_code == status, response.text
    document = response.json()
    assert set(document) == {"error"}
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert re.search(says, error["message"]), error["message"]
    assert "Traceback" not in response.text
    assert response.headers["x-request-id"]
    assert response.headers["x-content-type-options"] == "nosniff"
    return error


def chunks_of(response: Any) -> list[dict[str, Any]]:
    """The chunks of a stream that ended well."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


# ------------------------------------------------------- OpenAI's own client


def test_openais_client_reads_a_completion(served: Served) -> None:
    found = openai_client(served).completions.create(model="amber", prompt="hi")
    assert found.object == "text_completion"
    assert found.model == "amber"
    assert found.id.startswith("cmpl-")
    assert abs(found.created - time.time()) < 60
    [choice] = found.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("amber says 2 é", "stop", None)
    assert found.usage is not None
    assert found.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6,
    }  # fmt: skip


def test_openais_client_reads_a_chat(served: Served) -> None:
    found = openai_client(served).chat.completions.create(
        model="cedar", messages=HELLO, logprobs=True, top_logprobs=2, max_completion_tokens=2
    )
    assert found.object == "chat.completion"
    [choice] = found.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == "cedar says"
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    first, second = choice.logprobs.content
    assert (first.token, first.logprob, bytes(first.bytes or [])) == ("cedar", -0.5, b"cedar")
    assert [top.token for top in second.top_logprobs] == [" says", " other"]


def test_openais_client_reads_a_stream_of_a_completion(served: Served) -> None:
    stream = openai_client(served).completions.create(
        model="amber", prompt="hi", stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == "amber says 2 é"
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None, None, None, "stop"]
    assert [c.usage is None for c in chunks] == [True] * 4 + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6


def test_openais_async_client_reads_streams_of_chats_at_once(served: Served) -> None:
    async def one(client: openai.AsyncOpenAI, task: str) -> str:
        stream = await client.chat.completions.create(model=task, messages=HELLO, stream=True)
        deltas = [chunk.choices[0].delta async for chunk in stream]
        assert deltas[0].role == "assistant"
        assert {delta.role for delta in deltas[1:]} == {None}
        return "".join(delta.content or "" for delta in deltas)

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(api_key="x", base_url=f"{served.url}/v1") as client:
            return await asyncio.gather(*(one(client, task) for task in ["amber", "mu", "base"]))

    assert asyncio.run(all_of_them()) == [f"{task} says 7 é" for task in ["amber", "mu", "base"]]


def test_openais_client_reads_log_probabilities(served: Served) -> None:
    found = openai_client(served).completions.create(
        model="amber", prompt="hi", logprobs=1, echo=True, max_tokens=0
    )
    [choice] = found.choices
    assert choice.text == "hi"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == ["h", "i"]
    assert choice.logprobs.token_logprobs == [None, -1.0]
    assert choice.logprobs.top_logprobs == [None, {"i": -1.0}]
    assert choice.logprobs.text_offset == [0, 1]
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (2, 0)


def test_openais_client_reads_embeddings_in_both_forms(served: Served) -> None:
    plain = openai_client(served).embeddings.create(model="amber", input=["a", "bcd"])
    numbers = openai_client(served).embeddings.create(
        model="amber", input=["a", "bcd"], encoding_format="float"
    )
    for found in (plain, numbers):  # the first asks for base64 without saying so
        assert [each.embedding for each in found.data] == [[0.5, 1.0], [0.5, 3.0]]
        assert [each.index for each in found.data] == [0, 1]
        assert (found.usage.prompt_tokens, found.usage.total_tokens) == (4, 4)


def test_openais_client_lists_models(served: Served) -> None:
    client = openai_client(served)
    assert [m.id for m in client.models.list()] == ["mu", "base", "amber", "cedar"]
    found = client.models.retrieve("amber")
    assert (found.id, found.object, found.owned_by) == ("amber", "model", "run-7")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"model": "nope"}, openai.NotFoundError),
        ({"prompt": "!busy"}, openai.RateLimitError),
        ({"temperature": 9}, openai.BadRequestError),
        ({"prompt": "!break"}, openai.InternalServerError),
    ],
)
def test_openais_client_raises_its_own_errors(
    served: Served, fields: dict[str, Any], error: type[openai.APIStatusError]
) -> None:
    with pytest.raises(error) as raised:
        openai_client(served).completions.create(**({"model": "amber", "prompt": "hi"} | fields))
    assert raised.value.body is not None


def test_openais_client_raises_an_error_in_the_middle_of_a_stream(served: Served) -> None:
    stream = openai_client(served).completions.create(model="amber", prompt="!break", stream=True)
    got = []
    with pytest.raises(openai.APIError, match="its log has the reason under request id"):
        got.extend(chunk.choices[0].text for chunk in stream)
    assert got == ["amber", " says"]


def test_openais_client_raises_for_a_wrong_key() -> None:
    with Served(FakeService(), HttpSettings(api_keys={"right": ""})) as running:
        with pytest.raises(openai.AuthenticationError):
            openai_client(running).models.list()
        good = openai.OpenAI(api_key="right", base_url=f"{running.url}/v1")
        assert len(good.models.list().data) == 4


# ------------------------------------------------------------- completions


@pytest.mark.parametrize(
    ("prompt", "lengths"),
    [("abc", [3]), (["abc", "d"], [3, 1]), ([97, 98], [2]), ([[97], [98, 99, 100]], [1, 3])],
)
def test_a_prompt_is_a_text_or_tokens_or_a_list_of_such(
    client: TestClient, prompt: Any, lengths: list[int]
) -> None:
    found = ask(client, prompt=prompt, max_tokens=3).json()
    assert [c["text"] for c in found["choices"]] == [f"amber says {n}" for n in lengths]
    assert found["usage"]["prompt_tokens"] == sum(lengths)


@pytest.mark.parametrize(
    "prompt", ["leave out", None, 3, [], [[]], [True], [1.5], [-1], [2**31], ["a", 1], {"a": 1}]
)
def test_no_other_prompt_is_read(client: TestClient, prompt: Any) -> None:
    refused(ask(client, prompt=prompt), 400, "prompt")


def test_an_empty_prompt_is_refused(client: TestClient) -> None:
    refused(ask(client, prompt=""), 400, "no tokens")


def test_the_options_of_sampling_reach_the_service(
    client: TestClient, service: FakeService
) -> None:
    ask(client, temperature=0.25, top_p=0.5, max_tokens=2, stop=["x", "", "yz"], logprobs=3)
    [got] = service.asked
    assert (got.task, got.prompt_ids, got.max_tokens) == ("amber", [104, 105], 2)
    assert (got.temperature, got.top_p, got.stop) == (0.25, 0.5, ["x", "yz"])
    assert (got.top_logprobs, got.echo, got.seed) == (3, False, None)


def test_options_that_are_left_out_or_null_have_openais_defaults(
    client: TestClient, service: FakeService
) -> None:
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "stop",
        "logprobs",
        "echo",
        "stream",
    )
    ask(client)
    ask(client, **dict.fromkeys(names))
    one, other = service.asked
    assert one == other
    assert (one.max_tokens, one.temperature, one.top_p, one.stop) == (16, 1.0, 1.0, [])
    assert (one.top_logprobs, one.echo) == (None, False)


def test_a_temperature_too_near_zero_for_numbers_is_zero(
    client: TestClient, service: FakeService
) -> None:
    assert ask(client, temperature=1e-300).status_code == 200
    assert service.asked[0].temperature == 0.0


def test_one_stop_text_may_come_without_a_list(client: TestClient, service: FakeService) -> None:
    ask(client, stop="x")
    ask(client, stop=["x"] * 16)
    assert [got.stop for got in service.asked] == [["x"], ["x"] * 16]
    refused(ask(client, stop=["x"] * 17), 400, "'stop'")


def test_each_prompt_is_answered_n_times_with_seeds_that_follow(
    client: TestClient, service: FakeService
) -> None:
    found = ask(client, prompt=["a", "bc"], n=2, seed=7, max_tokens=3).json()
    assert [(c["index"], c["text"]) for c in found["choices"]] == [
        (0, "amber says 1"), (1, "amber says 1"), (2, "amber says 2"), (3, "amber says 2"),
    ]  # fmt: skip
    assert [got.seed for got in service.asked] == [7, 8, 7, 8]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 12, "total_tokens": 15}


def test_the_choices_of_a_stream_come_as_they_are_made(
    client: TestClient, service: FakeService
) -> None:
    service.delay = 0.01
    chunks = chunks_of(ask(client, n=3, stream=True))
    texts = ["", "", ""]
    order = []
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        order.append(choice["index"])
    assert texts == ["amber says 2 é"] * 3
    assert sorted(order[:3]) == [0, 1, 2]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert "usage" not in chunks[0]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_offsets_count_characters_of_the_text(client: TestClient, is_streamed: bool) -> None:
    answer = ask(client, logprobs=2, echo=True, stream=is_streamed)
    parts = chunks_of(answer) if is_streamed else [answer.json()]
    told = [part["choices"][0] for part in parts]
    text = "".join(choice["text"] for choice in told)
    tokens = [token for choice in told for token in choice["logprobs"]["tokens"]]
    offsets = [at for choice in told for at in choice["logprobs"]["text_offset"]]
    assert text == "hiamber says 2 é"
    assert [text[at:].startswith(token) for token, at in zip(tokens, offsets, strict=True)] == (
        [True] * 6
    )
    # An impossible token has a number too, which JSON can write.
    assert told[-1]["logprobs"]["top_logprobs"][-1][" other"] == -9999.0


@pytest.mark.parametrize("is_streamed", [False, True])
def test_each_choice_has_offsets_of_its_own(client: TestClient, is_streamed: bool) -> None:
    answer = ask(client, logprobs=0, n=2, max_tokens=2, stream=is_streamed)
    parts = chunks_of(answer) if is_streamed else [answer.json()]
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for choice in (choice for part in parts for choice in part["choices"]):
        offsets[choice["index"]] += choice["logprobs"]["text_offset"]
    assert offsets == {0: [0, 5], 1: [0, 5]}


def test_the_token_that_came_is_among_the_likeliest(client: TestClient) -> None:
    found = ask(client, logprobs=0, max_tokens=1).json()
    assert found["choices"][0]["logprobs"]["top_logprobs"] == [{"amber": -0.5}]


def test_at_most_128_choices_are_made_for_one_request(client: TestClient) -> None:
    assert len(ask(client, prompt=["a"] * 64, n=2).json()["choices"]) == 128
    refused(ask(client, prompt=["a"] * 43, n=3), 400, "129 answers, more than the 128")
    refused(ask(client, CHAT, n=129), 400, "more than the 128")


def test_more_answers_than_can_ever_wait_are_refused(
    client: TestClient, service: FakeService
) -> None:
    service.most_requests = 3
    assert len(ask(client, prompt=["a"], n=3).json()["choices"]) == 3
    refused(ask(client, prompt=["a", "b"], n=2), 400, "4 answers, more than the 3")
    refused(ask(client, CHAT, n=4), 400, "more than the 3")


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(
    client: TestClient, service: FakeService
) -> None:
    refused(ask(client, prompt="a" * LIMIT), 400, f"the {LIMIT} tokens")
    refused(ask(client, prompt="a" * 60, max_tokens=5), 400, f"60 tokens .* 5, .* {LIMIT}")
    assert ask(client, prompt="a" * 60, max_tokens=4).status_code == 200
    assert ask(client, prompt="a" * 60).status_code == 200  # the usual 16 are not insisted on
    assert [got.max_tokens for got in service.asked] == [4, 4]
    refused(ask(client, CHAT, messages=[{"role": "user", "content": "a" * LIMIT}]), 400, "shorten")


# --------------------------------------------------------------------- chat


def test_messages_are_texts_or_lists_of_parts(client: TestClient) -> None:
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
        {"role": "assistant", "content": "c", "refusal": None, "tool_calls": [], "annotations": []},
        {"role": "user", "content": "d"},
    ]
    service = FakeService()
    assert ask(client_of(service), CHAT, messages=messages).status_code == 200
    ids = service.asked[0].prompt_ids
    assert "".join(map(chr, ids)) == "s:be|s:brief|u:ab|a:c|u:d"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user"}], "content.* missing"),
        ([{"role": "user", "content": None}], "content.* missing"),
        ([{"role": "user", "content": 3}], "content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "image_url"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "content must be a text"),
        ([{"role": "user", "content": "x", "name": "Eve"}], "option name"),
        ([{"role": "user", "content": "x", "foo": 1}], r"messages\.0\.foo.*not known"),
        ([{"role": "assistant", "content": "x"}], "the template wants a user's message last"),
    ],
)
def test_other_messages_are_refused(client: TestClient, messages: Any, says: str) -> None:
    refused(ask(client, CHAT, messages=messages), 400, says)


def test_an_answer_in_a_chat_may_take_all_the_room_there_is(
    client: TestClient, service: FakeService
) -> None:
    ask(client, CHAT)
    ask(client, CHAT, max_tokens=3)
    ask(client, CHAT, max_completion_tokens=2)
    assert [got.max_tokens for got in service.asked] == [LIMIT - 7, 3, 2]
    refused(ask(client, CHAT, max_tokens=3, max_completion_tokens=2), 400, "leave one of them out")
    refused(ask(client, CHAT, max_tokens=0), 400, "at least 1")


def test_a_stream_of_a_chat_begins_with_the_role_and_ends_with_the_reason(
    client: TestClient,
) -> None:
    chunks = chunks_of(
        ask(client, CHAT, stream=True, stream_options={"include_usage": True}, logprobs=True)
    )
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert [d["delta"]["content"] for d in deltas[1:-1]] == ["amber", " says", " 7", " é"]
    assert deltas[1]["logprobs"]["content"][0]["token"] == "amber"
    assert (deltas[-1]["delta"], deltas[-1]["finish_reason"]) == ({}, "stop")
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["usage"]["completion_tokens"] == 4


def test_log_probabilities_of_a_chat_are_told_if_asked_for(
    client: TestClient, service: FakeService
) -> None:
    assert ask(client, CHAT).json()["choices"][0]["logprobs"] is None
    ask(client, CHAT, logprobs=True)
    assert [got.top_logprobs for got in service.asked] == [None, 0]
    refused(ask(client, CHAT, top_logprobs=2), 400, "set logprobs")


def test_a_model_without_a_chat_template_says_where_to_ask(service: FakeService) -> None:
    service.has_chat = False
    refused(ask(client_of(service), CHAT), 400, "no chat template; ask /v1/completions")


# ------------------------------------------- what is not understood is refused


@pytest.mark.parametrize(
    ("url", "name", "value"),
    [
        (COMPLETIONS, "best_of", 2),
        (COMPLETIONS, "suffix", "end"),
        (COMPLETIONS, "logit_bias", {"50256": -100}),
        (COMPLETIONS, "presence_penalty", 0.5),
        (COMPLETIONS, "frequency_penalty", -0.5),
        (CHAT, "tools", [{"type": "function"}]),
        (CHAT, "tool_choice", "required"),
        (CHAT, "response_format", {"type": "json_object"}),
        (CHAT, "modalities", ["text", "audio"]),
        (CHAT, "reasoning_effort", "high"),
        (CHAT, "metadata", {"a": "b"}),
        (CHAT, "store", True),
        (EMBEDDINGS, "dimensions", 3),
    ],
)
def test_an_option_that_the_server_has_not_is_refused_by_name(
    client: TestClient, url: str, name: str, value: Any
) -> None:
    more = {"input": "x"} if url == EMBEDDINGS else {}
    refused(ask(client, url, **{name: value}, **more), 400, f"option {name}; leave it out")


@pytest.mark.parametrize("url", [COMPLETIONS, CHAT])
def test_options_that_ask_for_nothing_are_accepted(client: TestClient, url: str) -> None:
    neutral: dict[str, Any] = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "user": "me",
    }  # fmt: skip
    own: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"best_of": 1, "suffix": None},
        CHAT: {
            "tools": None, "tool_choice": "none", "response_format": {"type": "text"},
            "parallel_tool_calls": True, "store": False, "modalities": ["text"], "metadata": None,
        },
    }  # fmt: skip
    assert ask(client, url, **neutral, **own[url]).status_code == 200


@pytest.mark.parametrize(
    ("url", "method"),
    [(COMPLETIONS, "POST"), (CHAT, "POST"), (EMBEDDINGS, "POST"), ("/v1/tasks/x", "PUT")],
)
def test_an_unknown_field_is_refused_by_name(client: TestClient, url: str, method: str) -> None:
    body = {"model": "amber", "prompt": "x", "messages": HELLO, "input": "x", "row": [[[0.5]]]}
    wanted = {
        COMPLETIONS: ("model", "prompt"), CHAT: ("model", "messages"),
        EMBEDDINGS: ("model", "input"),
    }.get(url, ("row",))  # fmt: skip
    fields = {name: body[name] for name in wanted}
    for value in (1, None):
        error = refused(
            client.request(method, url, json={**fields, "top_k": value}),
            400,
            "'top_k' is not known",
        )
        assert error["param"] == "top_k"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1}, {"max_tokens": "16"}, {"max_tokens": 1.5}, {"max_tokens": 2**31},
        {"max_tokens": True}, {"temperature": -0.1}, {"temperature": 2.1}, {"temperature": "1"},
        {"temperature": True}, {"top_p": 0}, {"top_p": 1.1}, {"n": 0}, {"n": 10**9},
        {"seed": 2**63}, {"seed": "x"}, {"stop": 3}, {"stop": [3]}, {"logprobs": 21},
        {"logprobs": True},
        {"echo": 1}, {"stream": "yes"}, {"stream_options": {"include_usage": True}},
        {"stream": True, "stream_options": {"foo": 1}}, {"model": 3}, {"model": None},
    ],
)  # fmt: skip
def test_values_that_an_option_has_not_are_refused(
    client: TestClient, service: FakeService, fields: dict[str, Any]
) -> None:
    error = refused(ask(client, **fields), 400)
    assert any(name in error["message"] for name in fields)
    assert not service.asked


# --------------------------------------------------------------- embeddings


def test_an_encoder_embeds_and_writes_nothing(service: FakeService) -> None:
    service.writes = False
    client = client_of(service)
    refused(ask(client), 400, "an encoder, .* ask /v1/embeddings")
    refused(ask(client, CHAT), 400, "an encoder")
    assert ask(client, EMBEDDINGS, input="x").json()["data"][0]["embedding"] == [0.5, 1.0]


def test_base64_is_fp32_in_little_endian(client: TestClient) -> None:
    found = ask(client, EMBEDDINGS, input="abc", encoding_format="base64").json()
    data = base64.b64decode(found["data"][0]["embedding"])
    assert struct.unpack("<2f", data) == (0.5, 3.0)


@pytest.mark.parametrize("text", [[], [1, 2], [[1]], 3, None, ["a", None], {"a": 1}])
def test_only_texts_are_embedded(client: TestClient, text: Any) -> None:
    refused(ask(client, EMBEDDINGS, input=text), 400, "input")


# ------------------------------------------------------------------- models


def test_models_come_in_pages(client: TestClient, service: FakeService) -> None:
    service.rows = {f"t{i:05}": [] for i in range(2500)}
    expected, found, after = ["mu", "base", *service.rows], [], {}
    pages = 0
    while True:
        document = client.get("/v1/models", params=after).json()
        found += [model["id"] for model in document["data"]]
        pages += 1
        assert document["object"] == "list"
        if not document["has_more"]:
            break
        after = {"after": document["last_id"]}
    assert found == expected
    assert pages == 3
    first = client.get("/v1/models", params={"limit": 1}).json()
    assert [model["id"] for model in first["data"]] == ["mu"]
    second = client.get("/v1/models", params={"limit": 2, "after": "mu"}).json()
    assert [model["id"] for model in second["data"]] == ["base", "t00000"]
    # A task that was removed since still has a place in the list.
    gone = client.get("/v1/models", params={"after": "t00009x", "limit": 1}).json()
    assert gone["data"][0]["id"] == "t00010"
    begun = client.get("/v1/models", params={"prefix": "t0012", "limit": 3, "after": "t00121"})
    assert [model["id"] for model in begun.json()["data"]] == ["t00122", "t00123", "t00124"]
    assert begun.json()["has_more"]
    few = client.get("/v1/models", params={"prefix": "m"}).json()
    assert [model["id"] for model in few["data"]] == ["mu"]
    none = client.get("/v1/models", params={"prefix": "zz"}).json()
    assert (none["data"], none["last_id"], none["has_more"]) == ([], None, False)
    for limit in ("0", "x", "100001"):
        refused(client.get("/v1/models", params={"limit": limit}), 400, "'limit'")


@pytest.mark.parametrize("name", ["a/b", "ä ö/✓", "a%2Fb", "a?b#c", "..", "x/"])
def test_names_may_have_slashes_and_any_character(
    client: TestClient, service: FakeService, name: str
) -> None:
    from urllib.parse import quote

    service.rows[name] = [[[1.0]]]
    path = quote(name, safe="/") if name != ".." else "%2e%2e"
    assert ask(client, model=name).json()["model"] == name
    with Served(FakeService()) as running:
        running.service.rows = service.rows
        for url in (f"/v1/models/{path}", f"/v1/tasks/{path}", f"/v1/tasks/{path}/row"):
            if name == "..":  # clients take this for a folder above
                continue
            got = httpx.get(running.url + url)
            assert got.status_code == 200, got.text
            assert name in got.json().values()


def test_a_model_that_does_not_exist_is_404_with_openais_code(client: TestClient) -> None:
    for response in (
        ask(client, model="nope"), ask(client, CHAT, model="nope"), client.get("/v1/models/nope"),
        ask(client, EMBEDDINGS, model="nope", input="x"), ask(client, model="nope", stream=True),
        client.get("/v1/tasks/nope"), client.get("/v1/tasks/nope/row"),
        client.get("/v1/tasks/nope/nearest"), client.post("/v1/tasks/nope/export"),
        client.delete("/v1/tasks/nope"),
    ):  # fmt: skip
        error = refused(
            response, 404, "^the model 'nope' does not exist; GET /v1/models lists all$"
        )
        assert error["code"] == "model_not_found"


# -------------------------------------------------------------------- tasks


def test_a_task_is_learnt_and_asked_about(client: TestClient, service: FakeService) -> None:
    started = client.post(
        "/v1/tasks",
        json={"name": "new", "examples": [{"input": "x", "target": "y"}], "lr": 0.1, "steps": None},
    )
    assert started.status_code == 202
    assert started.json() == {
        "name": "new", "status": "waiting", "error": None, "given": {"lr": 0.1},
    }  # fmt: skip
    assert client.get("/v1/tasks/new").json() == {
        "name": "new", "answers": False, "job": started.json(),
    }  # fmt: skip
    assert client.get("/v1/tasks/amber").json() == {"name": "amber", "answers": True, "job": None}


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"examples": [{"input": "x"}]}, "'name' is missing"),
        ({"name": "new", "examples": []}, "'examples'"),
        ({"name": "new", "examples": [3]}, "examples.0"),
        ({"name": "new", "examples": [{}]}, "example 1 of 'new' has no input"),
        ({"name": "", "examples": [{"input": "x"}]}, "cannot be a task's"),
        ({"name": "mu", "examples": [{"input": "x"}]}, "'mu' cannot be a task's"),
        ({"name": "base", "examples": [{"input": "x"}]}, "'base' cannot be a task's"),
    ],
)
def test_a_task_that_cannot_be_learnt_is_refused(
    client: TestClient, body: dict[str, Any], says: str
) -> None:
    refused(client.post("/v1/tasks", json=body), 400, says)


def test_too_many_jobs_are_told_to_come_back(client: TestClient, service: FakeService) -> None:
    service.jobs = {"one": {}, "two": {}}
    response = client.post("/v1/tasks", json={"name": "new", "examples": [{"input": "x"}]})
    refused(response, 429, "two tasks are being learnt")
    assert response.headers["retry-after"] == "1"


def test_rows_are_read_written_and_removed(client: TestClient, service: FakeService) -> None:
    assert client.get("/v1/tasks/amber/row").json() == {
        "name": "amber", "row": [[[0.5]]], "weights": [[[1.0]]], "routers": ["router 1"],
    }  # fmt: skip
    assert client.put("/v1/tasks/new/one", json={"row": [[[1, 2.5]]]}).status_code == 201
    assert service.rows["new/one"] == [[[1, 2.5]]]
    again = client.put("/v1/tasks/new/one", json={"row": [[[3.0]]]})
    assert (again.status_code, again.json()) == (200, {"name": "new/one", "new": False})
    assert client.delete("/v1/tasks/new/one").json() == {
        "id": "new/one", "object": "task", "deleted": True,
    }  # fmt: skip
    refused(client.delete("/v1/tasks/new/one"), 404)
    refused(client.put("/v1/tasks/new", json={"row": [[[1.0]], [[1.0]]]}), 400, "2 layers, not 1")
    for row in (None, [], [1.0], [[[None]]], [[[1e39]]], [[["1"]]], [[[[1.0]]]], [[[True]]], "x"):
        refused(client.put("/v1/tasks/new", json={"row": row}), 400, "row")
    for name in ("mu", "base"):
        refused(client.put(f"/v1/tasks/{name}", json={"row": [[[1.0]]]}), 400, "cannot be a task's")
        refused(client.delete(f"/v1/tasks/{name}"), 400, "cannot be a task's")
        for part in ("row", "nearest"):
            refused(client.get(f"/v1/tasks/{name}/{part}"), 400, f"'{name}' has no row")


def test_a_server_that_keeps_no_tasks_says_so(service: FakeService) -> None:
    service.can_learn = False
    client = client_of(service)
    for response in (
        client.post("/v1/tasks", json={"name": "x", "examples": [{"input": "x"}]}),
        client.put("/v1/tasks/amber", json={"row": [[[1.0]]]}),
        client.delete("/v1/tasks/amber"),
    ):
        refused(response, 400, "keeps no tasks of clients; .* --tasks-dir")


def test_the_nearest_tasks_are_listed(client: TestClient, service: FakeService) -> None:
    service.rows |= {f"t{i}": [] for i in range(9)}
    found = client.get("/v1/tasks/amber/nearest").json()
    assert [each["name"] for each in found["nearest"]] == ["cedar", "t0", "t1", "t2", "t3"]
    assert found["nearest"][0]["similarity"] == 0.9
    assert len(client.get("/v1/tasks/amber/nearest?k=2").json()["nearest"]) == 2
    refused(client.get("/v1/tasks/amber/nearest?k=0"), 400, "'k'")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("amber", "amber"),
        ("a/../b", "a_b"),
        ('x"; a=b', "x_a_b"),
        ("✓", "_"),
    ],
)
def test_an_export_is_a_zip_file_with_a_harmless_name(name: str, file: str) -> None:
    from urllib.parse import quote

    client = client_of(FakeService([name]))
    found = client.post(f"/v1/tasks/{quote(name, safe='')}/export")
    assert found.content == b"PK" + name.encode()
    assert found.headers["content-type"] == "application/zip"
    assert found.headers["content-disposition"] == f'attachment; filename="{file}.zip"'


# ------------------------------------------------------------------- access


def as_(client: TestClient, key: str, method: str, url: str, **body: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}"}
    return client.request(method, url, headers=headers, **({"json": body} if body else {}))


@pytest.fixture
def tenants() -> TestClient:
    names = ["a/one", "a/two", "b/one", "b/secret", "plain"]
    return client_of(FakeService(names), api_keys=TENANTS)


EVERYTHING = [
    ("GET", "/v1/models"), ("GET", "/v1/models/mu"), ("POST", COMPLETIONS), ("POST", CHAT),
    ("POST", EMBEDDINGS), ("POST", "/v1/tasks"), ("GET", "/v1/tasks/x"), ("PUT", "/v1/tasks/x"),
    ("DELETE", "/v1/tasks/x"), ("GET", "/v1/tasks/x/row"), ("GET", "/v1/tasks/x/nearest"),
    ("POST", "/v1/tasks/x/export"), ("GET", "/metrics"), ("GET", "/openapi.json"),
    ("GET", "/v1/load"), ("GET", "/other"),
]  # fmt: skip


@pytest.mark.parametrize(
    "authorization", [None, "Bearer", "Bearer ", "Bearer wrong", "key-a", "Basic key-a", "Bearer é"]
)
@pytest.mark.parametrize(("method", "url"), EVERYTHING)
def test_nothing_is_told_without_a_key(
    tenants: TestClient, method: str, url: str, authorization: str | None
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    response = tenants.request(method, url, headers=headers)
    assert refused(response, 401, "Authorization: Bearer KEY")["code"] == "invalid_api_key"
    assert response.headers["www-authenticate"] == "Bearer"


def test_the_page_and_the_health_need_no_key(tenants: TestClient) -> None:
    assert tenants.get("/health").status_code == 200
    assert tenants.get("/").status_code == 200
    assert all(tenants.get(url).status_code == 200 for url in page.FILES)
    refused(tenants.get("/page.css/"), 401)
    assert as_(tenants, "key-a", "GET", "/metrics").status_code == 200


def test_a_key_sees_its_own_tasks_under_their_short_names(tenants: TestClient) -> None:
    def names(key: str) -> list[str]:
        return [model["id"] for model in as_(tenants, key, "GET", "/v1/models").json()["data"]]

    assert names("key-a") == ["mu", "base", "one", "two"]
    begun = as_(tenants, "key-a", "GET", "/v1/models?prefix=t").json()["data"]
    assert [model["id"] for model in begun] == ["two"]
    assert as_(tenants, "key-a", "GET", "/v1/models?prefix=b").json()["data"][0]["id"] == "base"
    assert names("key-b") == ["mu", "base", "one", "secret"]
    assert names("key-all") == ["mu", "base", "a/one", "a/two", "b/one", "b/secret", "plain"]
    found = as_(tenants, "key-a", "POST", COMPLETIONS, model="one", prompt="x").json()
    assert found["model"] == "one"
    assert found["choices"][0]["text"].startswith("a/one says")
    shared = as_(tenants, "key-a", "POST", COMPLETIONS, model="mu", prompt="x").json()
    assert shared["choices"][0]["text"].startswith("mu says")


def test_names_of_others_cannot_be_told_from_names_that_nobody_has(tenants: TestClient) -> None:
    def answers(name: str) -> list[Any]:
        ways: list[tuple[str, str, dict[str, Any]]] = [
            ("GET", f"/v1/models/{name}", {}), ("GET", f"/v1/tasks/{name}", {}),
            ("GET", f"/v1/tasks/{name}/row", {}), ("GET", f"/v1/tasks/{name}/nearest", {}),
            ("POST", f"/v1/tasks/{name}/export", {}), ("DELETE", f"/v1/tasks/{name}", {}),
            ("POST", COMPLETIONS, {"model": name, "prompt": "x"}),
            ("POST", CHAT, {"model": name, "messages": HELLO}),
            ("POST", EMBEDDINGS, {"model": name, "input": "x"}),
        ]  # fmt: skip
        found = [as_(tenants, "key-a", method, url, **body) for method, url, body in ways]
        return [(each.status_code, each.text.replace(name, "NAME")) for each in found]

    for theirs in ("b/secret", "secret", "plain", "a/one", "../b/secret", "b/../b/secret"):
        told = answers(theirs)
        assert {status for status, _ in told} == {404}, theirs
        if ".." not in theirs:
            assert told == answers("nobody")


def test_what_a_key_makes_and_removes_is_its_own() -> None:
    service = FakeService(["a/one", "b/one"])
    client = client_of(service, api_keys=TENANTS)
    assert as_(client, "key-a", "PUT", "/v1/tasks/b/one", row=[[[2.0]]]).status_code == 201
    assert as_(client, "key-a", "PUT", "/v1/tasks/one", row=[[[3.0]]]).status_code == 200
    assert as_(client, "key-a", "DELETE", "/v1/tasks/b/one").status_code == 200
    assert service.rows == {"a/one": [[[3.0]]], "b/one": [[[0.5]]]}
    job = as_(client, "key-a", "POST", "/v1/tasks", name="new", examples=[{"input": "x"}])
    assert job.json()["name"] == "new"
    service.jobs["a/new"]["error"] = "'a/new' has too few examples"
    told = as_(client, "key-a", "GET", "/v1/tasks/new").json()
    assert told["job"]["error"] == "'new' has too few examples"
    refused(as_(client, "key-b", "GET", "/v1/tasks/new"), 404)
    refused(as_(client, "key-a", "PUT", "/v1/tasks/x", row=[[], []]), 400, "the row of 'x' has")
    refused(as_(client, "key-a", "PUT", "/v1/tasks/mu", row=[[[1.0]]]), 400, "cannot be a task's")


def test_a_prefix_cannot_make_a_name_of_all() -> None:
    service = FakeService()
    client = client_of(service, api_keys={"key": "m"})
    refused(as_(client, "key", "PUT", "/v1/tasks/u", row=[[[1.0]]]), 400, "cannot be a task's")
    assert "mu" not in service.rows


def test_only_own_tasks_are_near(tenants: TestClient) -> None:
    found = as_(tenants, "key-a", "GET", "/v1/tasks/one/nearest").json()
    assert [each["name"] for each in found["nearest"]] == ["two"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_task_that_vanished_is_unknown_and_no_other_is_named(is_streamed: bool) -> None:
    service = FakeService(["a/one", "b/secret"])
    client = client_of(service, api_keys=TENANTS)
    service.errors["!gone"] = InputError("unknown task 'a/one': did you mean 'b/secret'?")
    was = service.has_task
    seen = iter([True, True])
    service.has_task = lambda name: next(seen, was("x"))  # type: ignore[method-assign]
    response = as_(
        client, "key-a", "POST", COMPLETIONS, model="one", prompt="!gone", stream=is_streamed
    )
    refused(response, 404, "the model 'one' does not exist")
    assert "secret" not in response.text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=12), st.text(max_size=12))
def test_a_key_never_reaches_a_name_outside_its_prefix(prefix: str, name: str) -> None:
    from polyroute.serving.http.access import Names
    from polyroute.serving.requests import SHARED

    names = Names(prefix)
    inner = names.inner(name)
    assert inner in SHARED or inner.startswith(prefix)
    assert names.outer(inner) == name or inner in SHARED


def test_keys_are_read_from_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\nall\n  one a/ \n\ttwo\tb/\nteam t/\nmember t/x/\n")
    path.chmod(0o600)
    assert read_api_keys(path) == {
        "all": "",
        "one": "a/",
        "two": "b/",
        "team": "t/",
        "member": "t/x/",
    }
    assert not caplog.records
    path.chmod(0o644)
    read_api_keys(path)
    assert "chmod 600" in caplog.text
    assert "member" not in caplog.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no API key"),
        ("# nothing\n", "has no API key"),
        ("a b c\n", "line 1: write `KEY` or `KEY PREFIX`"),
        ("clé\n", "line 1: .*ASCII"),
        ("x a/\nx b/\n", "line 2: the file has this key twice"),
        ("x a\ny ab\n", "the key of 'a' would see the tasks of 'ab'"),
        ("x \u200e\x07\n", "U\\+0007"),
    ],
)
def test_a_file_of_keys_that_is_not_one_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o600)
    with pytest.raises(InputError, match=says):
        read_api_keys(path)


# -------------------------------------------------------------- other sites


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
@pytest.mark.parametrize(
    ("method", "url"),
    [("POST", COMPLETIONS), ("POST", CHAT), ("POST", EMBEDDINGS), ("POST", "/v1/tasks"),
     ("PUT", "/v1/tasks/x")],
)  # fmt: skip
def test_a_form_of_another_site_cannot_ask(
    client: TestClient, service: FakeService, method: str, url: str, kind: str | None
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    body = b'{"model": "amber", "prompt": "hi"}'
    response = client.request(method, url, content=body, headers=headers)
    refused(response, 415, "send the header `Content-Type: application/json`")
    assert not service.asked


def test_json_may_name_its_encoding(client: TestClient) -> None:
    body = json.dumps({"model": "amber", "prompt": "hi"}).encode()
    for kind in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"Content-Type": kind}
        assert client.post(COMPLETIONS, content=body, headers=headers).status_code == 200


def test_no_other_site_may_read_answers(client: TestClient) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    for response in (
        client.options(COMPLETIONS, headers=headers),
        client.get("/", headers=headers),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
    assert client.options(COMPLETIONS, headers=headers).status_code == 405


def test_a_server_is_called_by_its_own_names_alone(service: FakeService) -> None:
    client = client_of(service, allowed_hosts=("localhost", "127.0.0.1", "[::1]"))
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
        assert client.get("/health", headers={"Host": host}).status_code == 200, host
    for host in ("evil.example", "localhost.evil.example", "evil.example:8000", "::1", ""):
        response = client.get("/v1/models", headers={"Host": host})
        assert response.status_code == 400, host
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client_of(service).get("/health", headers={"Host": "any.example"}).status_code == 200


def test_each_file_of_the_page_has_a_strict_policy(client: TestClient) -> None:
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
    files = [file for file in page.FOLDER.iterdir() if file.is_file()]
    assert {"index.html", "page.css", "page.js"} <= {file.name for file in files}
    for file in files:
        found = client.get("/" if file.name == "index.html" else f"/{file.name}")
        assert found.content == file.read_bytes()
        assert found.headers["content-type"].startswith(kinds[file.suffix[1:]])
        assert found.headers["x-content-type-options"] == "nosniff"
        policy = found.headers["content-security-policy"].split("; ")
        assert policy == [
            "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'",
            "img-src 'self' data:", "frame-ancestors 'none'", "base-uri 'none'",
            "form-action 'none'",
        ]  # fmt: skip
    for url in ("/page.html", "/index.html", "/..%2fservice.py", "/page%2findex.html"):
        refused(client.get(url), 404)


def test_there_is_an_openapi_document_and_no_page_of_it(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) >= {COMPLETIONS, CHAT, EMBEDDINGS, "/v1/models", "/health"}
    assert "422" not in json.dumps(document)
    for url in ("/docs", "/redoc"):
        refused(client.get(url), 404)


# ------------------------------------------------------------ hostile bodies


def posted(client: TestClient, body: bytes, url: str = COMPLETIONS) -> Any:
    return client.post(url, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "the body is missing; send a JSON object"),
        (b"not JSON", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "too deep"),
        (b'{"model":' * 100_000, "too deep"),
        (b"[" * 900 + b"]" * 900, ""),
        (b'{"model": "amber", "prompt": "x", "temperature": NaN}', "NaN"),
        (b'{"model": "amber", "prompt": "x", "temperature": 1e999}', "NaN or an infinite"),
        (b'{"model": "amber", "prompt": "x", "temperature": -Infinity}', "NaN or an infinite"),
        (b'{"model": "amber", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b'{"model": "amber", "prompt": "x", "seed": ' + b"9" * 299 + b"}", "seed"),
        (b'{"model": "amber", "prompt": "x", "n": 1e300}', "'n'"),
        (b'{"model": "amber", "prompt": "x\\ud800"}', "surrogate"),
        (b'{"model": "\\udfff", "prompt": "x"}', "surrogate"),
        (b'{"model": "amber", "prompt": "x", "\\ud800": 1}', "surrogate"),
        (b'{"model": "amber", "model": "mu", "prompt": "x"}', "'model' twice"),
        (b"[]", "body"),
        (b"3", "body"),
        (b"null", "body"),
        (b'"x"', "body"),
    ],
)
def test_a_hostile_body_is_one_sentence(client: TestClient, body: bytes, says: str) -> None:
    refused(posted(client, body), 400, says)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    "model", "prompt", "messages", "input", "max_tokens", "temperature", "top_p", "n", "seed",
    "stop", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "logit_bias", "tools",
    "encoding_format", "name", "examples", "row", "user", "lr",
]  # fmt: skip
FUZZED = [
    ("POST", COMPLETIONS, {"model": "amber", "prompt": "hi"}),
    ("POST", CHAT, {"model": "amber", "messages": HELLO}),
    ("POST", EMBEDDINGS, {"model": "amber", "input": "hi"}),
    ("POST", "/v1/tasks", {"name": "x", "examples": [{"input": "y"}]}),
    ("PUT", "/v1/tasks/x", {"row": [[[1.0]]]}),
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(FUZZED), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_no_values_of_fields_make_the_server_fail(
    case: tuple[str, str, dict[str, Any]], fields: dict[str, Any]
) -> None:
    method, url, body = case
    content = json.dumps(body | fields).encode()
    headers = {"Content-Type": "application/json"}
    response = FUZZ_CLIENT.request(method, url, content=content, headers=headers)
    assert response.status_code in (200, 201, 202, 400, 404), response.text
    if response.status_code >= 400:
        refused(response, response.status_code)
    FUZZ_SERVICE.jobs.clear()


FUZZ_SERVICE = FakeService()
FUZZ_CLIENT = client_of(FUZZ_SERVICE)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40))
def test_no_bytes_make_the_server_fail(body: bytes) -> None:
    refused(posted(FUZZ_CLIENT, body), 400)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(blacklist_categories=["Cs"]), max_size=20))
def test_no_path_makes_the_server_fail(path: str) -> None:
    from urllib.parse import quote

    for url in (f"/{quote(path)}", f"/v1/tasks/{quote(path)}", f"/v1/models/{quote(path)}"):
        assert FUZZ_CLIENT.get(url).status_code in (200, 404)


def test_large_bodies_are_refused(service: FakeService) -> None:
    client = client_of(service, max_body=1000)
    body = json.dumps({"model": "amber", "prompt": "x" * 2000}).encode()
    refused(posted(client, body), 413, "larger than the 1000 bytes")

    def parts() -> Iterator[bytes]:  # whose size nobody declares
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    response = client.post(
        COMPLETIONS, content=parts(), headers={"Content-Type": "application/json"}
    )
    refused(response, 413, "larger than the 1000 bytes")
    assert not service.asked


def test_large_bodies_are_refused_over_the_network(served: Served) -> None:
    body = json.dumps({"model": "amber", "prompt": "x" * 5 * 2**20}).encode()
    headers = {"Content-Type": "application/json"}
    response = httpx.post(served.url + COMPLETIONS, content=body, headers=headers)
    refused(response, 413, "larger than the 4194304 bytes")


# ------------------------------------------------------------------- errors


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "says", "kind"),
    [
        (BusyError(), 429, "too many requests wait", "rate_limit_error"),
        (StoppingError(), 503, "shutting down", "server_error"),
        (ServingError("the model made NaN of it"), 500, "the model made NaN of it", "server_error"),
        (InputError("the prompt is odd; write another"), 400, "odd", "invalid_request_error"),
        (ValueError("secret"), 500, "its log has the reason under request id [0-9a-f]{32}$",
         "server_error"),
        (TimeoutError("secret"), 500, "its log has the reason", "server_error"),
    ],
)  # fmt: skip
def test_each_error_before_the_first_piece_has_its_status(
    service: FakeService, is_streamed: bool, error: Exception, status: int, says: str, kind: str
) -> None:
    service.errors["!x"] = error
    response = ask(client_of(service), prompt="!x", stream=is_streamed)
    assert refused(response, status, says)["type"] == kind
    assert "secret" not in response.text
    assert response.headers.get("retry-after") == ("1" if status == 429 else None)


def test_one_choice_that_fails_ends_the_others(client: TestClient, service: FakeService) -> None:
    response = ask(client, prompt=["!hang", "!busy", "!hang"])
    refused(response, 429)
    assert (service.started, service.closed) == (3, 3)


def test_an_error_in_a_stream_is_its_last_event(client: TestClient) -> None:
    response = ask(client, prompt="!break", stream=True)
    *good, bad, end = response.text.split("\n\n")
    assert len(good) == 2
    assert end == ""
    error = json.loads(bad.removeprefix("data: "))["error"]
    assert error["code"] == "server_failed"
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in error["message"]


def test_an_error_of_a_route_that_nobody_foresaw_is_an_error_object(
    client: TestClient, service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(prefix: str = "") -> list[str]:
        raise ZeroDivisionError("secret")

    service.task_names = fails  # type: ignore[method-assign]
    response = client.get("/v1/models", headers={"X-Request-Id": "mine"})
    refused(response, 500, "under request id mine")
    assert "secret" not in response.text
    [logged] = [json.loads(r.message) for r in caplog.records if r.levelno == logging.ERROR]
    assert logged["request_id"] == "mine"
    assert "ZeroDivisionError: secret" in logged["trace"]


def test_addresses_and_methods_that_do_not_exist_are_error_objects(client: TestClient) -> None:
    refused(client.get("/v1/nothing"), 404, "there is nothing at this address")
    refused(client.get("/health/", follow_redirects=False), 404)
    response = client.get(COMPLETIONS)
    refused(response, 405, "does not take this method")
    assert response.headers["allow"] == "POST"


# ------------------------------------------------- timeouts, clients that leave


@pytest.mark.parametrize(
    ("url", "fields"),
    [
        (COMPLETIONS, {"prompt": "!hang"}),
        (COMPLETIONS, {"prompt": ["x", "!hang"]}),
        (COMPLETIONS, {"prompt": "!hang", "stream": True}),
        (COMPLETIONS, {"prompt": "!late"}),
        (EMBEDDINGS, {"input": "!hang"}),
    ],
)
def test_a_request_that_takes_too_long_is_ended(
    service: FakeService, url: str, fields: dict[str, Any]
) -> None:
    client = client_of(service, timeout=0.2)
    refused(ask(client, url, **fields), 504, "longer than the 0.2 seconds")
    assert service.closed == (1 if url == EMBEDDINGS else service.started)


def test_a_stream_that_takes_too_long_ends_with_an_error(service: FakeService) -> None:
    response = ask(client_of(service, timeout=0.2), prompt="!late", stream=True)
    *_, last, _ = response.text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"
    assert (service.started, service.closed) == (1, 1)


def test_a_body_that_nobody_reads_may_not_be_large_either() -> None:
    async def endless() -> Any:
        return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

    async def hang(scope: Any, receive: Any, send: Any) -> None:
        await until_gone(receive, asyncio.sleep(60), Deadline(60.0))

    async def ask() -> None:
        await BodyLimit(hang, 5000)({"type": "http", "headers": []}, endless, None)  # type: ignore[arg-type]

    with pytest.raises(HTTPException, match="larger than the 5000 bytes"):
        asyncio.run(ask())


def test_a_body_that_does_not_come_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    head = (
        f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        'Content-Length: 99\r\n\r\n{"model": '
    )
    caplog.set_level(logging.INFO, "polyroute.serve")
    with Served(FakeService(), HttpSettings(timeout=0.3)) as running:
        address = running.server.servers[0].sockets[0].getsockname()
        with socket.create_connection(address) as slow:
            slow.sendall(head.encode())
            assert slow.recv(100).startswith(b"HTTP/1.1 504")
        with socket.create_connection(address) as leaving:
            leaving.sendall(head.encode())
        wait_until(lambda: len(lines_of(caplog)) == 2)
    assert [line["status"] for line in lines_of(caplog)] == [504, 499]


def test_a_change_that_takes_too_long_goes_on(
    service: FakeService, caplog: pytest.LogCaptureFixture
) -> None:
    ended = threading.Event()

    async def slow(name: str) -> None:
        await asyncio.sleep(0.3)
        ended.set()
        raise ValueError("the disk is full")

    service.delete = slow  # type: ignore[method-assign]
    with client_of(service, timeout=0.1) as client:  # one loop for all of it
        refused(client.delete("/v1/tasks/amber"), 504, "longer than the 0.1 seconds")
        assert ended.wait(5)
        wait_until(lambda: "the disk is full" in caplog.text)


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("prompt", ["!hang", "!late", ["!late", "!hang", "!hang"]])
def test_answers_end_soon_after_their_client_has_left(
    served: Served, is_streamed: bool, prompt: Any
) -> None:
    service = served.service
    before, count = service.started, len(prompt) if isinstance(prompt, list) else 1
    wait_until(lambda: service.closed == before)
    body = {"model": "amber", "prompt": prompt, "stream": is_streamed}

    with httpx.Client() as client:
        thread = threading.Thread(target=leaving, args=(client, served.url, body))
        thread.start()
        wait_until(lambda: service.started == before + count)
        time.sleep(0.1)
        assert service.closed == before
    took = wait_until(lambda: service.closed == before + count)
    thread.join(5)
    assert took < 2.0


def leaving(client: httpx.Client, url: str, body: dict[str, Any]) -> None:
    """Ask, and leave after half a second."""
    try:
        with client.stream("POST", url + COMPLETIONS, json=body, timeout=0.5) as response:
            for _ in response.iter_bytes():
                pass
    except httpx.HTTPError:
        pass


def test_embedding_ends_when_the_client_has_left(served: Served) -> None:
    before = served.service.closed
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(served.url + EMBEDDINGS, json={"model": "amber", "input": "!hang"}, timeout=0.3)
    wait_until(lambda: served.service.closed == before + 1, 2.0)


def test_a_client_that_leaves_is_logged_as_such(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyroute.serve")
    for is_streamed in (False, True):
        body = {"model": "amber", "prompt": "!late", "stream": is_streamed}
        with httpx.Client() as client:
            leaving(client, served.url, body)
    wait_until(lambda: len(caplog.records) >= 2)
    assert [json.loads(record.message)["status"] for record in caplog.records] == [499, 499]


def test_a_stream_that_nobody_begins_to_read_is_closed() -> None:
    # The client leaves after the first piece was made, before the response began.
    service = FakeService()
    app = make_app(service, HttpSettings())
    body = json.dumps({"model": "amber", "prompt": "!late", "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1",
        "method": "POST", "path": COMPLETIONS, "raw_path": COMPLETIONS.encode(), "root_path": "",
        "query_string": b"", "headers": [(b"content-type", b"application/json")], "scheme": "http",
        "server": ("localhost", 80), "client": ("localhost", 1),
    }  # fmt: skip

    async def receive() -> Mapping[str, Any]:
        if messages:
            return messages.pop()
        while not service.started:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            await asyncio.sleep(60)  # what was sent before fills the connection

    asyncio.run(asyncio.wait_for(app(scope, receive, send), 5))
    assert (service.started, service.closed) == (1, 1)


# ---------------------------------------------------------- what the server tells


def lines_of(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        json.loads(record.message) for record in caplog.records if record.name == "polyroute.serve"
    ]


def test_each_request_is_one_line_of_json_in_the_log(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "polyroute.serve")
    ask(client, prompt="confidential")
    ask(client, CHAT, stream=True)
    ask(client, model="private")
    client.get("/nowhere/private")
    lines = lines_of(caplog)
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", COMPLETIONS, 200), ("POST", CHAT, 200), ("POST", COMPLETIONS, 404),
        ("GET", "unknown", 404),
    ]  # fmt: skip
    assert [(line["prompt_tokens"], line["completion_tokens"]) for line in lines] == [
        (12, 4), (7, 4), (0, 0), (0, 0),
    ]  # fmt: skip
    assert all(line["seconds"] > 0 and line["request_id"] for line in lines)
    text = "\n".join(
        record.message for record in caplog.records if record.name == "polyroute.serve"
    )
    assert not re.search("confidential|private|hello", text)


@pytest.mark.parametrize(
    ("given_id", "is_kept"),
    [
        ("abc-123", True),
        ("x" * 64, True),
        ("x" * 65, False),
        ("a b", False),
        ("é", False),
        ("", False),
    ],
)
def test_a_request_keeps_a_sane_id(client: TestClient, given_id: str, is_kept: bool) -> None:
    found = client.get("/health", headers={"X-Request-Id": given_id.encode("latin-1")})
    told = found.headers["x-request-id"]
    assert told == given_id if is_kept else re.fullmatch("[0-9a-f]{32}", told)


def test_metrics_count_by_route_and_never_by_name(client: TestClient, service: FakeService) -> None:
    ask(client)
    ask(client, stream=True, prompt="!break")
    ask(client, CHAT, model="nope")
    ask(client, prompt="!busy")  # nobody read this prompt
    for i in range(20):
        client.get(f"/v1/tasks/task-{i}")
        client.get(f"/{i}/{i}")
        client.request(f"METHOD{i}", f"/v1/models/m{i}")
    found = client.get("/metrics")
    assert found.headers["content-type"].startswith("text/plain; version=")
    text = found.text
    for line in (
        'polyroute_requests_total{route="/v1/completions",status="200"} 1.0',
        'polyroute_requests_total{route="/v1/completions",status="500"} 1.0',
        'polyroute_requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'polyroute_requests_total{route="/v1/tasks/{name:path}",status="404"} 20.0',
        'polyroute_requests_total{route="unknown",status="404"} 20.0',
        "polyroute_prompt_tokens_total 8.0",
        "polyroute_completion_tokens_total 6.0",
        "polyroute_first_token_seconds_count 2.0",
        'polyroute_request_seconds_count{route="/v1/completions"} 3.0',
        "polyroute_running 0.0",
        "polyroute_waiting 3.0",
    ):
        assert line in text.splitlines()
    assert not re.search(r"task-\d|nope|amber|METHOD|/m\d", text)


def test_each_app_has_metrics_of_its_own() -> None:
    one, other = client_of(FakeService()), client_of(FakeService())
    ask(one)
    assert "polyroute_prompt_tokens_total 0.0" in other.get("/metrics").text


def test_the_load_is_told_as_numbers(client: TestClient) -> None:
    assert client.get("/v1/load").json() == {"running": 0.0, "waiting": 3.0}


def test_health_follows_the_service(client: TestClient, service: FakeService) -> None:
    assert client.get("/health").json() == {
        "status": "ok", "name": "run-7", "writes": True, "has_chat": True, "has_rows": True,
        "can_learn": True, "max_length": LIMIT,
    }  # fmt: skip
    service.healthy = False
    found = client.get("/health")
    assert (found.status_code, found.json()["status"]) == (503, "failing")


def test_prompts_are_tokenized_outside_the_loop_one_at_a_time(served: Served) -> None:
    threads: list[str] = []
    at_once: list[int] = []
    running = 0

    def slow(text: str) -> list[int]:
        nonlocal running
        running += 1
        threads.append(threading.current_thread().name)
        at_once.append(running)
        time.sleep(0.1)
        running -= 1
        return [1]

    usual, served.service.prompt_ids = served.service.prompt_ids, slow  # type: ignore[method-assign]
    try:
        asking = [
            threading.Thread(target=openai_client(served).completions.create,
                             kwargs={"model": "amber", "prompt": "x"})
            for _ in range(3)
        ]  # fmt: skip
        for thread in asking:
            thread.start()
        wait_until(lambda: bool(threads))
        began = time.monotonic()
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert time.monotonic() - began < 0.25
        for thread in asking:
            thread.join(5)
    finally:
        served.service.prompt_ids = usual  # type: ignore[method-assign]
    assert all(name.startswith("tokenizing") for name in threads)
    assert max(at_once) == 1


def test_a_prompt_that_is_long_to_read_is_not_waited_for(service: FakeService) -> None:
    ended = threading.Event()

    def slow(text: str) -> list[int]:
        ended.wait(10)
        return [1]

    service.prompt_ids = slow  # type: ignore[method-assign]
    began = time.monotonic()
    refused(ask(client_of(service, timeout=0.1)), 504, "longer than the 0.1 seconds")
    assert time.monotonic() - began < 5
    ended.set()


def test_nothing_outside_its_folder_imports_the_extra() -> None:
    folder = Path(page.__file__).parents[2]
    importing = {
        path.relative_to(folder).parts[:2]
        for path in folder.rglob("*.py")
        if re.search(
            r"^\s*(from|import) (fastapi|starlette|uvicorn|prometheus_client|pydantic)",
            path.read_text(encoding="utf-8"), flags=re.MULTILINE,
        )
    }  # fmt: skip
    assert importing <= {("serving", "http"), ("program", "commands")}
