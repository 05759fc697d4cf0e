"""The page of `polyroute serve` in a real browser, with a server whose service needs no model."""

import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from in_browser import luminance, needs_chromium
from playwright.sync_api import Browser, BrowserContext, Page, expect
from serving_fake import FakeService, Served, wait_until

from polyroute.serving.http.settings import HttpSettings
from polyroute.serving.requests import Generation, Piece

HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>alert(1)</script>/../%2e"
TASKS = ["amber", "cedar", HOSTILE, *(f"task {i:03d}" for i in range(200))]
REFUSED = "Failed to load resource: the server responded with a status of"
"""What Chromium writes about each response with an error, whatever the page does with it."""

pytestmark = needs_chromium


class PageService(FakeService):
    """Rows of three routers, two heads and four skills; a task is learned while one looks."""

    def __init__(self) -> None:
        super().__init__(TASKS)
        self.max_length = 500
        self.learned: list[tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]] = []

    def load(self) -> Mapping[str, float]:
        return {"running": 2, "waiting": 1, "tokens_per_second": 1234.56, "rows_in_memory": 17}

    def row(self, name: str) -> list[Any]:
        super().row(name)
        return [[[float(n == k) * (h + 1) for k in range(4)] for h in range(2)] for n in range(3)]

    async def answer(self, generation: Generation) -> AsyncIterator[Piece]:
        async with aclosing(super().answer(generation)) as pieces:
            async for piece in pieces:  # several lines, which need more height than one
                yield replace(piece, text=piece.text.replace("says", "says\n\n\n\n"))

    async def learn(
        self, name: str, examples: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        self.learned.append((examples, settings))
        self.jobs[name] = {
            "name": name, "status": "waiting", "step": 0, "steps": settings["steps"],
            "loss": None, "seconds": 0.0, "error": None,
        }  # fmt: skip
        return self.jobs[name]

    def job(self, name: str) -> Mapping[str, Any] | None:
        job = self.jobs.get(name)
        if job is None or job["status"] in ("done", "failed"):
            return job
        job |= {"status": "running", "step": job["step"] + 10, "loss": 0.5, "seconds": 1.25}
        if job["step"] >= job["steps"]:
            job["status"] = "done"
            self.rows[name] = [[[0.5]]]
        if "fails" in name:
            job |= {"status": "failed", "error": "training diverged: lower route_lr"}
        return dict(job)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served(PageService()) as running:
        yield running


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    opened = browser.new_context(viewport={"width": 1200, "height": 800})
    yield opened
    opened.close()


@pytest.fixture
def refused() -> list[int]:
    """The statuses of refusals that a test causes on purpose."""
    return []


@pytest.fixture
def page(context: BrowserContext, served: Served, refused: list[int]) -> Iterator[Page]:
    """The page; afterwards, that nothing went wrong in it and nobody else was asked."""
    page = context.new_page()
    wrong: list[str] = []
    statuses: list[int] = []
    page.on("console", lambda m: m.text.startswith(REFUSED) or wrong.append(m.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on(
        "request", lambda r: r.url.startswith((served.url, "blob:", "data:")) or wrong.append(r.url)
    )
    page.on("response", lambda r: r.status >= 400 and statuses.append(r.status))
    page.expose_function("violated", lambda what: wrong.append(what))
    page.add_init_script(
        "addEventListener('securitypolicyviolation', (e) => violated(e.violatedDirective))"
    )
    opened(page, served)
    yield page
    assert page.title() == "run-7: polyroute"
    assert page.locator("img, main script, dialog script").count() == 0
    assert wrong == []
    assert statuses == refused


def opened(page: Page, served: Served) -> Page:
    page.goto(served.url)
    expect(page.locator("#run")).to_have_text("run-7")
    return page


def send(page: Page, task: str, prompt: str, *, mode: str = "text") -> None:
    page.locator("#task-one").fill(task)
    page.locator(f"[name=mode][value={mode}]").check()
    page.locator("#prompt").fill(prompt)
    page.locator("#prompt").press("Control+Enter")


def answer(page: Page, side: int = 0) -> Any:
    return page.locator(".answer").nth(side)


def told(page: Page, side: int = 0) -> Any:
    return page.locator(".side .state").nth(side)


def test_two_tasks_answer_side_by_side_as_they_write(page: Page, served: Served) -> None:
    page.locator("#compare").check()
    page.locator("#task-two").fill("cedar")
    places = (
        "['.numbers', '#adding'].map((id) => document.querySelector(id).getBoundingClientRect().y)"
    )
    both_write = (
        "[...document.querySelectorAll('.answer')].every((each) =>"
        " each.textContent.includes('says') && each.ariaBusy === 'true')"
    )
    before = page.evaluate(places)
    served.service.delay = 0.2
    try:
        send(page, "amber", "hello")
        # Playwright's own waiting evaluates text as a script, which the page's policy forbids.
        wait_until(lambda: page.evaluate(both_write))
        assert page.evaluate(places) == before
    finally:
        served.service.delay = 0.0
    expect(answer(page, 0)).to_have_text("amber says 5 é")
    expect(answer(page, 1)).to_have_text("cedar says 5 é")
    assert page.evaluate(places) == before
    for side in (0, 1):
        expect(told(page, side)).to_have_text("The task ended its answer.")
        expect(answer(page, side)).to_have_attribute("aria-busy", "false")
        first, tokens, rate = page.locator(".numbers").nth(side).locator("dd").all_inner_texts()
        assert int(first.removesuffix(" ms")) >= 150  # the first of four pauses
        assert tokens == "4"
        assert 0 < float(rate) < 10  # two of the pauses at least


def test_what_is_set_is_what_is_asked(page: Page, served: Served) -> None:
    for name, value in (("temperature", "0.7"), ("max-tokens", "3"), ("seed", "11")):
        page.locator(f"#{name}").fill(value)
    for mode, prompt in (("chat", "u:hello"), ("text", "hello")):
        send(page, "cedar", "hello", mode=mode)
        expect(told(page)).to_have_text("The answer has the most tokens that it may have.")
        asked = served.service.asked[-1]
        assert "".join(map(chr, asked.prompt_ids)) == prompt
        assert (asked.task, asked.temperature, asked.max_tokens, asked.seed) == (
            "cedar",
            0.7,
            3,
            11,
        )
    page.locator("#seed").fill("")
    send(page, "cedar", "hello")
    wait_until(lambda: served.service.asked[-1].seed is None)


def test_stop_ends_the_answers_on_the_server_too(page: Page, served: Served) -> None:
    page.locator("#compare").check()
    send(page, "amber", "!late")
    expect(answer(page, 1)).to_have_text("base")
    expect(told(page)).to_have_text("Answering.")
    assert served.service.started == served.service.closed + 2
    page.locator("#stop").press("Enter")
    for side in (0, 1):
        expect(told(page, side)).to_have_text("Stopped.")
    wait_until(lambda: served.service.started == served.service.closed)
    expect(page.locator("#stop")).to_be_focused()
    send(page, "amber", "hello")
    expect(answer(page)).to_have_text("amber says 5 é")


def test_errors_are_sentences(page: Page, refused: list[int]) -> None:
    send(page, "nobody", "hello")
    expect(told(page)).to_contain_text("The model 'nobody' does not exist;")
    send(page, "amber", "!busy")
    expect(told(page)).to_contain_text("Too many requests wait;")
    send(page, "amber", "x" * 600)
    expect(told(page)).to_contain_text("shorten the prompt or lower max_tokens.")
    refused += [404, 429, 400]
    send(page, "amber", "!break")  # in the middle of the stream
    expect(told(page)).to_contain_text("The server failed on this request;")
    expect(told(page)).to_have_class(re.compile("error"))
    expect(answer(page)).to_have_text("amber says")


def test_the_picker_finds_names_by_their_beginning(page: Page) -> None:
    field, state = page.locator("#task-one"), page.locator("#task-one-state")
    names = page.locator("#task-one-names option")
    for typed, count, sentence in (
        ("task 01", 10, "10 names begin so."),
        ("", 50, "More than 50 names begin so."),
        ("zzz", 0, "No name begins so."),
        ("task 017", 1, ""),
    ):
        field.fill(typed)
        expect(state).to_have_text(sentence)
        expect(names).to_have_count(count)
        expect(field).to_have_attribute("aria-invalid", str(typed == "zzz").lower())


PASTED: list[tuple[str, Any]] = [
    ("2 + 2\t4\r\n\r\n3 + 3\t6\r\n", [["2 + 2", "4"], ["3 + 3", "6"]]),
    ('\ufeff{"input": "a\\tb", "target": "c"}\n', [["a\tb", "c"]]),
    ('{"input": "", "instruction": "x", "target": "c", "choices": ["c", "d"]}', [["", "c"]]),
    ("", []),
    ("a\tb\n\nno tab", "line 3: there is no tab"),
    ("a\tb\tc", "line 1: there is more than one tab"),
    ("\tb", "line 1: there is no input"),
    ("a\t ", "line 1: there is no target"),
    ('{"input": "a", "target": "b"}\nc\td', "line 2: this is not valid JSON"),
    ('{"input": "a", "target": "b"}\n[1]', "line 2: this must be a JSON object"),
    ('{"input": "a", "target": 4}', 'line 1: "target" must be a text'),
    ('{"input": "a"}', 'line 1: "target" is missing'),
    ('{"target": "a"}', 'line 1: "input" and "instruction" are both'),
    ('{"input": "a", "target": "b", "choices": "b"}', 'line 1: "choices" must be a list'),
    ('{"input": "a", "target": "b", "choices": ["c"]}', 'line 1: "target" is none'),
]
"""What is pasted, and its inputs and targets or how the sentence about it begins."""


def test_examples_are_read_or_the_line_is_named(page: Page) -> None:
    read = (
        "async (text) => { const { examplesOf } = await import('/page-examples.js');"
        " try { return examplesOf(text).map((e) => [e.input, e.target]); }"
        " catch (error) { return error.message; } }"
    )
    for text, expected in PASTED:
        found = page.evaluate(read, text)
        assert found == expected or (isinstance(expected, str) and found.startswith(expected))


def test_a_task_is_learned_from_pasted_examples_and_chosen(page: Page, served: Served) -> None:
    field, state = page.locator("#examples"), page.locator("#examples-state")
    field.fill("2 + 2\t4\nno tab\n3 + 3\t6")
    page.locator("#name").fill("sums <b>")
    page.locator("#name").press("Enter")
    expect(state).to_have_text("Line 2: there is no tab between an input and its target.")
    expect(field).to_be_focused()
    assert page.evaluate("getSelection().toString()") == "no tab"
    assert served.service.learned == []
    page.keyboard.press("Backspace")
    expect(state).to_have_text("2 examples.")
    page.locator("#steps").fill("20")
    page.locator("#steps").press("Enter")
    job = page.locator("#jobs li")
    expect(job.locator("progress")).to_have_js_property("value", 10)
    expect(job).to_contain_text("Step 10 of 20, loss 0.500.")
    expect(job).to_contain_text("Learned in 1.3 seconds, loss 0.500; the playground has it.")
    ((examples, settings),) = served.service.learned
    assert examples == [{"input": "2 + 2", "target": "4"}, {"input": "3 + 3", "target": "6"}]
    assert settings == {"steps": 20}
    expect(page.locator("#task-one")).to_have_value("sums <b>")
    send(page, "sums <b>", "hello")
    expect(answer(page)).to_have_text("sums <b> says 5 é")


def test_a_task_that_cannot_be_learned_says_why(page: Page, refused: list[int]) -> None:
    page.locator("#examples").fill("a")
    page.locator("#tab").press("Enter")
    page.keyboard.type("b")
    page.locator("#name").fill("this fails")
    page.locator("#name").press("Enter")
    expect(page.locator("#jobs")).to_contain_text("Training diverged: lower route_lr.")
    page.locator("#name").fill("mu")
    page.locator("#name").press("Enter")
    expect(page.locator("#add-state")).to_contain_text("The name 'mu' cannot be a task's;")
    refused.append(400)


def test_the_explorer_shows_weights_and_is_walked_by_keys(page: Page) -> None:
    page.locator("#task-explored").fill("amber")
    page.locator("#task-explored").press("Enter")
    cells = page.locator("#heat tbody td")
    expect(cells).to_have_count(3 * 2 * 4)
    expect(page.locator("#heat-sizes")).to_have_text("3 routers, 2 heads, 4 skills.")
    shares = list(map(float, cells.all_inner_texts()[:8]))
    # The first of its four gates is sigmoid(1), then sigmoid(2); the others are one half.
    assert shares == [0.33, 0.22, 0.22, 0.22, 0.37, 0.21, 0.21, 0.21]
    page.locator("#heat [tabindex='0']").press("ArrowDown")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    readout = page.locator("#readout")
    expect(readout).to_have_text(re.compile(r", head 2, skill 2: 0\.370\.$"))
    page.keyboard.press("Control+End")
    page.keyboard.press("ArrowDown")
    expect(readout).to_have_text(re.compile(r", head 2, skill 4: 0\.\d{3}\.$"))
    assert page.locator("#heat [tabindex='0']").count() == 1
    nearest = page.locator("#nearest button")
    expect(nearest).to_have_count(8)
    nearest.first.press("Enter")
    expect(page.locator("#heat-title")).to_have_text("Weight of each skill in cedar")
    expect(page.locator("#task-explored")).to_have_value("cedar")


def test_a_task_is_downloaded_and_deleted(page: Page, served: Served) -> None:
    served.service.rows["mine/one"] = [[[0.5]]]
    page.locator("#task-explored").fill("mine/one")
    with page.expect_download() as download:
        page.locator("#export").press("Enter")
    assert download.value.suggested_filename == "mine_one.zip"
    assert download.value.path().read_bytes() == b"PKmine/one"
    page.locator("#delete").press("Enter")
    expect(page.locator("#sure")).to_contain_text("Delete the task mine/one?")
    page.keyboard.press("Escape")
    expect(page.locator("#sure")).to_be_hidden()
    assert "mine/one" in served.service.rows
    page.locator("#delete").press("Enter")
    expect(page.locator("#sure-no")).to_be_focused()
    page.locator("#sure-yes").press("Enter")
    expect(page.locator("#explore-state")).to_have_text("The task mine/one is deleted.")
    assert "mine/one" not in served.service.rows
    expect(page.locator("#task-explored-state")).to_have_text("No name begins so.")


def test_a_hostile_name_is_only_text(page: Page, refused: list[int]) -> None:
    page.locator("#compare").check()
    page.locator("#task-two").fill(HOSTILE)
    send(page, HOSTILE, "<img src=x onerror=alert(1)>")
    expect(answer(page, 1)).to_have_text(f"{HOSTILE} says 28 é")
    expect(page.locator(".side h3").first).to_have_text(HOSTILE)
    page.locator("#task-explored").fill(HOSTILE)
    page.locator("#show").click()
    expect(page.locator("#heat-title")).to_have_text(f"Weight of each skill in {HOSTILE}")
    page.locator("#task-explored").fill("amber")
    page.locator("#show").click()
    expect(page.locator("#nearest button").nth(1)).to_have_text(HOSTILE)
    page.locator("#task-one").fill("<img")
    expect(page.locator("#task-one-names option")).to_have_attribute("value", HOSTILE)
    send(page, "<img src=y>", "hello")
    expect(told(page)).to_contain_text("The model '<img src=y>' does not exist;")
    refused.append(404)


def test_every_field_has_a_name_and_tab_reaches_all_with_a_visible_focus(page: Page) -> None:
    for field in page.locator("input, textarea").all():
        assert field.evaluate("each => each.labels.length") == 1
    page.locator("#compare").check()
    page.locator(".skip").focus()
    seen: list[str] = []
    while seen[-1:] != ["delete"]:
        page.keyboard.press("Tab")
        place, outline = page.evaluate(
            "[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]"
        )
        assert outline == "solid"
        seen.append(place)
        assert len(seen) < 40
    wanted = [
        "task-one", "compare", "task-two", "prompt", "temperature", "max-tokens", "seed", "send",
        "stop", "answer-one", "answer-two", "examples", "tab", "name", "steps", "task-explored",
        "show", "use", "export", "delete",
    ]  # fmt: skip
    assert [place for place in seen if place in wanted] == wanted


def test_a_prompt_is_sent_and_compared_by_keyboard_alone(page: Page) -> None:
    page.locator("body").press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.locator("#task-one")).to_be_focused()
    page.keyboard.type("cedar")  # what was there is selected
    for key in ("Tab", "Space", "Tab", "a", "m", "b", "e", "r", "Tab", "ArrowDown", "Tab"):
        page.keyboard.press(key)
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("hello")
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(answer(page, 0)).to_have_text("cedar says 5 é")
    expect(answer(page, 1)).to_have_text("amber says 5 é")


def test_it_is_dark_where_that_is_wanted_and_still_where_nothing_may_move(page: Page) -> None:
    assert luminance(page, "body backgroundColor") > 0.9
    assert luminance(page, "body color") < 0.2
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    assert luminance(page, "body backgroundColor") < 0.2
    assert luminance(page, "body color") > 0.8
    for field in ("#prompt", "#task-one", "#send"):
        ground, letters = (luminance(page, f"{field} {of}") for of in ("backgroundColor", "color"))
        assert abs(ground - letters) > 0.4
    send(page, "amber", "!hang")
    expect(page.locator(".side")).to_have_class(re.compile("waiting"))
    moves = "getComputedStyle(document.querySelector('.answer'), '::after').animationName"
    assert page.evaluate(moves) == "none"
    page.locator("#stop").click()


def test_nothing_is_wider_than_a_narrow_screen(page: Page, refused: list[int]) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    send(page, HOSTILE + "x" * 80, "w" * 300)
    expect(told(page)).to_contain_text("does not exist")
    refused.append(404)
    width = "document.documentElement.scrollWidth"
    assert page.evaluate(width) <= 360
    page.locator("#compare").check()
    page.locator("#task-two").fill(HOSTILE)
    send(page, "amber", "hello")
    expect(told(page, 1)).to_have_text("The task ended its answer.")
    page.locator("#task-explored").fill("amber")
    page.locator("#show").click()
    expect(page.locator("#nearest li")).to_have_count(8)
    assert page.evaluate(width) <= 360


def test_the_load_is_looked_at_while_the_page_is_seen(
    context: BrowserContext, served: Served
) -> None:
    page = context.new_page()
    looks: list[str] = []
    page.on("request", lambda r: r.url.endswith("/v1/load") and looks.append(r.url))
    page.clock.install()
    opened(page, served)
    numbers = page.locator("#load dd")
    expect(numbers).to_have_text(["2", "1", "1,234.6", "17"])
    page.clock.run_for(2100)
    wait_until(lambda: page.evaluate("1") == 1 and len(looks) == 2)
    see = (
        "(isHidden) => { Object.defineProperty(document, 'hidden', { value: isHidden,"
        " configurable: true }); document.dispatchEvent(new Event('visibilitychange')); }"
    )
    page.evaluate(see, True)
    page.clock.run_for(10_000)
    assert len(looks) == 2
    page.evaluate(see, False)
    wait_until(lambda: page.evaluate("1") == 1 and len(looks) == 3)


def test_a_key_is_asked_for_and_forgotten(context: BrowserContext) -> None:
    with Served(PageService(), HttpSettings(api_keys={"right": "", "mine": "task 1"})) as served:
        page = opened(context.new_page(), served)
        reason, field = page.locator("#key-reason"), page.locator("#key")
        expect(reason).to_have_text("This server asks for an API key.")
        expect(field).to_be_focused()
        for key, sentence in (
            ("two words", "A key has letters, digits and signs of ASCII, and no spaces."),
            ("wrong", "The server does not know this API key."),
        ):
            field.fill(key)
            field.press("Enter")
            expect(reason).to_have_text(sentence)
        field.fill("mine")
        field.press("Enter")
        expect(page.locator("#key-form")).to_be_hidden()
        expect(page.locator("#load dd").first).to_have_text("2")
        page.locator("#task-one").fill("23")
        expect(page.locator("#task-one-names option")).to_have_attribute("value", "23")
        send(page, "23", "hello")
        expect(answer(page)).to_have_text("task 123 says 5 é")
        page.reload()
        expect(page.locator("#load dd").first).to_have_text("2")
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [
            1, 0, "",
        ]  # fmt: skip
        page.locator("#forget-key").click()
        expect(reason).to_have_text("This server asks for an API key.")
        assert page.evaluate("sessionStorage.length") == 0
        page.close()


def test_only_what_the_server_can_do_is_offered(context: BrowserContext) -> None:
    with Served(PageService()) as served:
        served.service.has_chat = False
        page = opened(context.new_page(), served)
        expect(page.locator("#prompt")).to_be_visible()
        expect(page.locator("#modes")).to_be_hidden()
        send_plain = page.locator("#prompt")
        send_plain.fill("hello")
        send_plain.press("Control+Enter")
        expect(answer(page)).to_have_text("mu says 5 é")
        served.service.writes = served.service.can_learn = False
        page.reload()
        expect(page.locator("#no-text")).to_be_visible()
        expect(page.locator("#no-learning")).to_be_visible()
        for place in ("#prompt", "#examples", "#delete", "#use"):
            expect(page.locator(place)).to_be_hidden()
        page.close()


def test_a_server_that_went_away_is_told(context: BrowserContext) -> None:
    with Served(PageService()) as served:
        page = context.new_page()
        page.clock.install()
        opened(page, served)
        expect(page.locator("#load dd").first).to_have_text("2")
    page.clock.run_for(2100)
    gone = "The server does not answer: look whether it still runs."
    expect(page.locator("#trouble")).to_have_text(gone)
    expect(page.locator("#load dd").first).to_have_text("-")
    send(page, "mu", "hello")
    expect(told(page)).to_have_text(gone)
    page.close()
