"""`polyroute serve` in a process of its own, asked by the clients that people have."""

import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from commands_run import refused
from serving_process import Server, serving
from serving_runs import NAMES, alone, base_and_kind, write_run

from polyroute.saved.rows import SavedRoutes

EXAMPLES = [{"input": f"word {i}", "target": "yes" if i % 2 else "no"} for i in range(8)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    place = tmp_path_factory.mktemp("serve")
    return place / "run", write_run(place / "run")


@pytest.fixture(scope="module")
def served(written: tuple[Path, Any]) -> Iterator[Server]:
    place = written[0].parent
    arguments = ["--tasks-dir", str(place / "tasks"), "--max-length", "128"]
    with serving(place / "log", str(written[0]), *arguments) as server:
        yield server


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def expected(model: Any, text: str, task: str | None, count: int = 8) -> str:
    _, kind = base_and_kind("causal")
    ids = kind.tokenizer(text)["input_ids"]
    found = alone(model, kind, ids, task, count)
    return str(kind.tokenizer.decode(found, skip_special_tokens=True))


def test_the_client_of_openai_gets_each_tasks_answer(
    served: Server, written: tuple[Path, Any]
) -> None:
    ask = client(served)
    assert [one.id for one in ask.models.list().data][:2] == ["mu", "base"]
    for task in (NAMES[0], NAMES[7], "mu", "base"):
        route = None if task == "base" else task
        answer = ask.completions.create(model=task, prompt="a cat", max_tokens=8, temperature=0)
        assert answer.choices[0].text == expected(written[1], "a cat", route)
    chunks = ask.chat.completions.create(
        model=NAMES[3], messages=[{"role": "user", "content": "hi"}], max_tokens=8,
        temperature=0, stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    told = list(chunks)
    _, kind = base_and_kind("causal")
    text = kind.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    said = "".join(c.choices[0].delta.content or "" for c in told if c.choices)
    assert said == expected(written[1], text, NAMES[3])
    assert told[-1].usage.prompt_tokens == len(kind.tokenizer(text)["input_ids"])
    with pytest.raises(openai.NotFoundError):
        ask.completions.create(model="nobody", prompt="a")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_adds_a_task_and_asks_it(served: Server) -> None:
    def curl(path: str, *arguments: str) -> Any:
        program = ["curl", "--silent", "--fail-with-body", f"{served.url}/v1/{path}", *arguments]
        return json.loads(subprocess.run(program, capture_output=True, check=True).stdout)

    def given(body: Any) -> list[str]:
        return ["-H", "Content-Type: application/json", "-d", json.dumps(body)]

    job = curl("tasks", *given({"name": "of curl", "examples": EXAMPLES, "steps": 2}))
    assert job["steps"] == 2
    end = time.monotonic() + 60
    while curl("tasks/of%20curl")["job"]["status"] in ("waiting", "running"):
        assert time.monotonic() < end
        time.sleep(0.1)
    assert curl("tasks/of%20curl")["answers"]
    answer = curl("completions", *given({"model": "of curl", "prompt": "a", "max_tokens": 2}))
    assert answer["model"] == "of curl"


def test_lm_eval_scores_a_task_over_http(
    served: Server, written: tuple[Path, Any], tmp_path: Path
) -> None:
    import lm_eval
    import torch

    rows = [{"q": f"a{i % 3}", "a": i % 2} for i in range(6)]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "toy.yaml").write_text(
        f"task: toy\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.json'}\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{q}} is"\ndoc_to_target: a\ndoc_to_choice: ["on", "off"]\n'
    )
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": NAMES[2], "base_url": f"{served.url}/v1/completions",
            "tokenized_requests": True, "tokenizer": str(written[0].parent / "base"),
            "num_concurrent": 4, "max_length": 100,
        },
        tasks=["toy"], log_samples=True, batch_size=1,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path)),
    )  # fmt: skip
    model, (_, kind) = written[1], base_and_kind("causal")
    for sample in found["samples"]["toy"]:
        for choice, ((told, _),) in zip((" on", " off"), sample["resps"], strict=True):
            prompt = kind.tokenizer(f"{sample['doc']['q']} is")["input_ids"]
            whole = kind.tokenizer(f"{sample['doc']['q']} is{choice}")["input_ids"]
            ids = torch.tensor([whole])
            with torch.no_grad():
                logits = model(input_ids=ids, tasks=NAMES[2]).logits[0, :-1].log_softmax(-1)
            own = logits.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
            assert float(told) == pytest.approx(float(own), abs=1e-3)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_it_drains_and_ends_well(
    written: tuple[Path, Any], tmp_path: Path, number: signal.Signals
) -> None:
    with serving(tmp_path / "log", str(written[0])) as server:
        answers: list[int] = []

        def ask() -> None:
            asked = {"model": "base", "prompt": "a", "max_tokens": 120, "temperature": 1.5}
            answers.append(httpx.post(f"{server.url}/v1/completions", json=asked).status_code)

        httpx.get(f"{server.url}/health").raise_for_status()
        asking = [threading.Thread(target=ask) for _ in range(6)]
        for one in asking:
            one.start()
        time.sleep(0.3)
        assert server.end(number) == 0
        for one in asking:
            one.join()
        assert answers == [200] * 6
        assert "answered" in server.log.read_text()


def test_rows_survive_a_kill_between_any_two_requests(
    written: tuple[Path, Any], tmp_path: Path
) -> None:
    row = written[1].routes[NAMES[0]].tolist()
    known: list[str] = []
    for turn in range(2):
        arguments = (str(written[0]), "--tasks-dir", str(tmp_path / "tasks"))
        with serving(tmp_path / "log", *arguments) as server:
            told = {one.id for one in client(server).models.list().data}
            assert set(known) <= told
            killer = threading.Timer(0.3, server.process.send_signal, [signal.SIGKILL])
            killer.start()
            with suppress(httpx.HTTPError):
                for number in range(10**6):
                    name = f"{turn} {number}"
                    url = f"{server.url}/v1/tasks/{name}"
                    httpx.put(url, json={"row": row}).raise_for_status()
                    known.append(name)
    saved = SavedRoutes(tmp_path / "tasks")
    assert known
    assert set(known) <= set(saved.names())
    assert all(saved.read(name).tolist() == row for name in saved.names())


def test_what_cannot_be_served_is_refused_before_anything_loads(
    written: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(written[0])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert "choose another one with --port" in refused(
            ["serve", run, "--port", str(port)], capsys
        )
    assert "give a file of keys" in refused(["serve", run, "--host", "0.0.0.0"], capsys)
    assert "holds no inventory" in refused(["serve", str(tmp_path)], capsys)
    keys = tmp_path / "keys"
    keys.write_text("# none\n")
    assert "no API key" in refused(["serve", run, "--api-keys", str(keys)], capsys)
    many = ["serve", run, "--max-length", "100000", "--port", "0"]
    assert "the model reads 256 tokens" in refused(many, capsys)


def test_a_missing_extra_is_named(
    written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from polyroute.program.commands import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert "pip install 'polyroute[serve]'" in refused(["serve", str(written[0])], capsys)


def test_keys_keep_tenants_apart(written: tuple[Path, Any], tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("alpha a/\nbeta b/\nall\n")
    keys.chmod(0o600)
    row = written[1].routes[NAMES[0]].tolist()
    arguments = ["--tasks-dir", str(tmp_path / "tasks"), "--api-keys", str(keys)]
    with serving(tmp_path / "log", str(written[0]), *arguments) as server:

        def ask(key: str, method: str, path: str, **body: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return httpx.request(method, f"{server.url}/v1/{path}", headers=headers, **body)

        assert ask("wrong", "GET", "models").status_code == 401
        assert ask("alpha", "PUT", "tasks/mine", json={"row": row}).status_code == 201
        asked = {"model": "mine", "prompt": "a", "max_tokens": 1}
        assert ask("alpha", "POST", "completions", json=asked).status_code == 200
        assert ask("beta", "POST", "completions", json=asked).status_code == 404
        asked["model"] = "a/mine"
        assert ask("beta", "POST", "completions", json=asked).status_code == 404
        assert ask("all", "POST", "completions", json=asked).status_code == 200
        assert [one["id"] for one in ask("beta", "GET", "models").json()["data"]] == ["mu", "base"]
