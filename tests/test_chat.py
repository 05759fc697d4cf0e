"""Chat templates: prompts and answers have the tokens that `apply_chat_template` gives."""

import copy
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import polyroute as pr
from polyroute.errors import InputError
from polyroute.kinds.causal import CausalKind
from polyroute.kinds.chat import ChatTemplate, template_of
from polyroute.kinds.seq2seq import Seq2SeqKind
from polyroute.study.examples import encoded_records

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are kind<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (  # marks no generation: the answer follows [/INST]
    "{% if messages[0]['role'] == 'system' %}{% set ns = '<<SYS>>' + messages[0]['content'] + "
    "'<</SYS>>' %}{% set rest = messages[1:] %}{% else %}{% set ns = '' %}{% set rest = messages %}"
    "{% endif %}{% for m in rest %}{% if m['role'] == 'user' %}<s>[INST] {{ ns if loop.first else "
    "'' }}{{ m['content'] }} [/INST]{% else %} {{ m['content'] | trim }} </s>{% endif %}"
    "{% endfor %}"
)
GEMMA = (
    "<bos>{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}<start_of_turn>{{ role }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
THINKING = (  # as of DeepSeek-R1: a prompt opens a thinking part, which past answers do not have
    "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}{% else %}<A>"
    "{{ m['content'].split('</think>')[-1] }}<e>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
STYLES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama2": (LLAMA2, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<bos>", "<eos>", "<start_of_turn>",
           "<end_of_turn>", "<U>", "<A>", "<e>", "<think>", "</think>"]  # fmt: skip


def tokenizer(template: str | None, eos: str = "<eos>") -> Any:
    """Bytes as tokens, and some pairs that are merged: two newlines, and `an`."""
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: number for number, letter in enumerate(sorted(alphabet))}
    merges = [("Ċ", "Ċ"), ("a", "n")]
    vocab.update({one + other: len(vocab) + i for i, (one, other) in enumerate(merges)})
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    model.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=eos, pad_token=eos,
        extra_special_tokens=[one for one in SPECIAL if one != eos],
    )  # fmt: skip
    fast.chat_template = template
    return fast


def rendered(tok: Any, messages: list[dict[str, str]], *, opened: bool) -> list[int]:
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    ids: list[int] = tok(text, add_special_tokens=False)["input_ids"]
    return ids


def example(**given: Any) -> dict[str, list[Any]]:
    row = {"task": "t", "instruction": "Name a fruit", "input": "It is yellow", "target": "banana",
           "choices": None, **given}  # fmt: skip
    return {name: [value] for name, value in row.items()}


USER = {"role": "user", "content": "Name a fruit\nIt is yellow"}
ANSWER = {"role": "assistant", "content": "banana"}


@pytest.mark.parametrize("style", STYLES)
def test_prompt_and_answer_are_the_tokens_of_the_template(style: str) -> None:
    template, end = STYLES[style]
    tok = tokenizer(template)
    row = CausalKind(tok).encode(example())
    assert row["prompt_ids"][0] == rendered(tok, [USER], opened=True)
    whole = rendered(tok, [USER, ANSWER], opened=False)
    whole = whole[: len(whole) - whole[::-1].index(tok.convert_tokens_to_ids(end))]
    assert row["prompt_ids"][0] + row["target_ids"][0] == whole


@pytest.mark.parametrize("style", STYLES)
def test_a_conversation_with_a_system_message_is_rendered_whole(style: str) -> None:
    template, end = STYLES[style]
    tok = tokenizer(template)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    row = CausalKind(tok).encode(example(system="Be short", history=history))
    system = {"role": "system", "content": "Be short"}
    whole = rendered(tok, [system, *history, USER, ANSWER], opened=False)
    found = row["prompt_ids"][0] + row["target_ids"][0]
    assert found == whole[: len(found)]
    assert found[-1] == tok.convert_tokens_to_ids(end)


def test_a_system_message_of_the_kind_is_in_every_prompt() -> None:
    tok = tokenizer(CHATML)
    kind = CausalKind(tok, prompt=ChatTemplate(tok, system="Be short"))
    text = tok.decode(kind.encode(example())["prompt_ids"][0])
    assert text.startswith("<|im_start|>system\nBe short<|im_end|>")


def test_a_merge_across_the_border_does_not_shift_the_answer() -> None:
    tok = tokenizer(CHATML)
    row = CausalKind(tok).encode(example(target="\nan end"))
    assert row["prompt_ids"][0] == rendered(tok, [USER], opened=True)  # what a server would send
    assert tok.decode(row["target_ids"][0]) == "\nan end<|im_end|>"
    whole = rendered(tok, [USER, {**ANSWER, "content": "\nan end"}], opened=False)
    assert whole[: len(row["prompt_ids"][0])] != row["prompt_ids"][0]


def test_a_thinking_part_that_answers_lack_is_left_out_of_prompts() -> None:
    tok = tokenizer(THINKING)
    with pytest.warns(UserWarning, match="without it, in training and in evaluation"):
        kind = CausalKind(tok)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    for given in ({}, {"history": history}):
        row = kind.encode(example(target="yes", **given))
        whole = rendered(tok, [*given.get("history", []), USER, {**ANSWER, "content": "yes"}],
                         opened=False)  # fmt: skip
        assert row["prompt_ids"][0] + row["target_ids"][0] == whole
        assert tok.decode(row["target_ids"][0]) == "yes<e>"
    assert kind.prompting.left_out == "<think>\n"


def test_a_prompt_never_ends_within_a_special_token() -> None:
    tok = tokenizer(THINKING.replace("<A>{{", "<A></think>{{"))
    with pytest.warns(UserWarning, match="without it"):
        row = CausalKind(tok).encode(example(target="yes"))
    assert tok.decode(row["prompt_ids"][0]).endswith("<A>")
    assert tok.decode(row["target_ids"][0]) == "</think>yes<e>"


@pytest.mark.filterwarnings("ignore:the chat template ends prompts")
@pytest.mark.parametrize(
    ("template", "target", "message"),
    [
        (THINKING, "since</think>yes", "does not write the whole answer 'since</think>yes'"),
        (THINKING.replace("<U>", "<U>{{ messages | length }}"), "yes", "once it is answered"),
    ],
)
def test_a_template_that_writes_something_else_is_refused(
    template: str, target: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"{message}.*use prompt='plain'"):
        CausalKind(tokenizer(template)).encode(example(target=target))


def test_what_a_template_writes_before_an_answer_is_no_part_of_a_generated_text() -> None:
    template = THINKING.replace("<A>{{", "<A><think>\n\n</think>\n\n{{")  # as of Qwen3
    for token in ("think>", "/think>"):  # no special tokens there
        template = template.replace(f"<{token}", f"[{token}")
    tok = tokenizer(template)
    kind = CausalKind(tok)
    ids = kind.encode(example(target="yes"))["target_ids"][0]
    assert kind._texts(torch.tensor([ids])) == ["yes"]
    assert kind._texts(torch.tensor([ids[-4:]])) == ["yes"]


def test_an_answer_is_not_cut_where_no_token_ends_a_turn() -> None:
    template = THINKING.replace("<A><think>\n", "<A>").replace("<A>{{", "<A>\n<think></think>\n{{")
    tok = tokenizer(template.replace("}}<e>", "}}"))  # as of GLM
    kind = CausalKind(tok)
    ids = kind.encode(example(target="yes"))["target_ids"][0]
    assert tok.decode(ids) == "\n<think></think>\nyes<eos>"
    assert kind._texts(torch.tensor([ids])) == ["yes"]


def test_a_special_token_within_an_answer_does_not_end_it() -> None:
    tok = tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    ids = CausalKind(tok).encode(example(target="say <s> and go"))["target_ids"][0]
    assert tok.decode(ids).endswith("say <s> and go\n<eos>")


def test_a_prompt_that_a_system_message_ends_otherwise_is_kept_if_answers_follow_it() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<U>{{ m['content'] }}"
        "{% elif m['role'] == 'assistant' %}<A>{{ m['content'] }}<e>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<A>{% if messages[0]['content'] == 'no' %}<think>"
        "{% elif messages[0]['content'] == 'or' %}</think>{% endif %}{% endif %}"
    )
    tok = tokenizer(template)
    with pytest.warns(UserWarning, match="without it"):
        kind = CausalKind(tok, prompt=ChatTemplate(tok, system="no"))
    for system in (None, "yes"):
        ids = kind.encode(example(system=system))["prompt_ids"][0]
        assert tok.decode(ids).endswith("It is yellow<A>")
    with pytest.raises(InputError, match="does not end every prompt with '<think>'"):
        kind.encode(example(system="or"))


def test_the_code_of_a_card_makes_the_prompts_of_a_thinking_model() -> None:
    tok = tokenizer(THINKING)
    with pytest.warns(UserWarning, match="without it"):
        kind = CausalKind(tok)
    assert "is left out" in kind.prompting.sentence()
    names: dict[str, Any] = {"tokenizer": tok}
    exec("\n".join(kind.prompting.code("Name a fruit")), names)
    ids = kind.encode(example(input=""))["prompt_ids"][0]
    assert names["prompt"]["input_ids"][0].tolist() == ids


def test_choices_are_answers_too() -> None:
    tok = tokenizer(CHATML)
    row = CausalKind(tok).encode(example(choices=["banana", "an apple"]))
    assert [tok.decode(ids) for ids in row["choice_ids"][0]] == [
        "banana<|im_end|>", "an apple<|im_end|>",
    ]  # fmt: skip
    assert row["label"] == [0]


def test_an_answer_without_a_token_at_its_end_gets_the_end_token() -> None:
    tok = tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    ids = CausalKind(tok).encode(example())["target_ids"][0]
    assert ids[-1] == tok.eos_token_id
    assert "banana" in tok.decode(ids)


@pytest.mark.parametrize("room", [0, 5, 20])
def test_of_a_long_prompt_the_input_goes_and_nothing_else(room: int) -> None:
    tok = tokenizer(CHATML)
    bare = len(rendered(tok, [{**USER, "content": "Name a fruit"}], opened=True))
    kind = CausalKind(tok, max_input=bare + room, max_target=16)
    ids = kind.encode(example(input="a long story " * 20 + "with an end"))["prompt_ids"][0]
    text = tok.decode(ids)
    assert len(ids) <= bare + room
    assert "Name a fruit" in text
    assert text.startswith("<|im_start|>system")
    assert text.endswith("<|im_start|>assistant\n")
    assert ("end<|im_end|>" in text) == (room > 4)


def test_of_a_long_conversation_the_oldest_turns_go_first() -> None:
    tok = tokenizer(CHATML)
    history = [
        {"role": role, "content": f"{role} {number}"}
        for number in range(9) for role in ("user", "assistant")
    ]  # fmt: skip
    kind = CausalKind(tok, max_input=180, max_target=16)
    text = tok.decode(kind.encode(example(history=history))["prompt_ids"][0])
    assert "assistant 8" in text
    assert "user 0" not in text
    assert "Name a fruit\nIt is yellow" in text


def test_a_system_message_that_leaves_no_room_is_refused() -> None:
    tok = tokenizer(CHATML)
    with pytest.raises(InputError, match="raise max_input"):
        CausalKind(tok, max_input=30).encode(example(system="word " * 50))


def test_who_has_no_template_is_prompted_by_the_text() -> None:
    assert template_of("auto", tokenizer(None)) is None
    assert template_of("plain", tokenizer(CHATML)) is None
    with pytest.raises(InputError, match="no chat template"):
        template_of("chat", tokenizer(None))
    with pytest.raises(InputError, match=r"no chat template .*: leave out --system"):
        ChatTemplate(tokenizer(None), "Be short")
    with pytest.raises(InputError, match="chat"):
        template_of("chatt", tokenizer(CHATML))
    tok = tokenizer(CHATML)
    row = CausalKind(tok, prompt="plain").encode(example())
    assert tok.decode(row["prompt_ids"][0]) == "Name a fruit\nIt is yellow\n"


def test_a_template_that_raises_is_named() -> None:
    broken = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match="no system role"):
        CausalKind(tokenizer(broken))


def test_an_encoder_decoder_has_no_chat() -> None:
    config = transformers.T5Config(architectures=["T5ForConditionalGeneration"])
    with pytest.raises(InputError, match="decoder-only"):
        pr.kind_of(config, tokenizer(CHATML), prompt="chat")
    assert isinstance(pr.kind_of(config, tokenizer(CHATML)), Seq2SeqKind)


def test_generation_ends_at_the_end_of_the_turn() -> None:
    tok = tokenizer(GEMMA)
    ends = CausalKind(tok)._ends
    assert ends == [tok.convert_tokens_to_ids("<end_of_turn>"), tok.eos_token_id]


def test_equal_templates_encode_under_one_fingerprint() -> None:
    from datasets.fingerprint import Hasher

    tok = tokenizer(CHATML)
    kind = CausalKind(tok)
    before = Hasher.hash(kind.encode)
    kind.encode(example())
    assert Hasher.hash(kind.encode) == before
    assert Hasher.hash(CausalKind(copy.deepcopy(tok)).encode) == before
    other = CausalKind(tok, prompt=ChatTemplate(tok, system="Be short"))
    assert Hasher.hash(other.encode) != before


@pytest.mark.parametrize("make", [CausalKind, Seq2SeqKind])
def test_without_a_template_a_conversation_is_its_texts(make: Any) -> None:
    tok = tokenizer(None)
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    ids = make(tok).encode(example(system="Be short", history=history))["prompt_ids"][0]
    text = tok.decode(ids, skip_special_tokens=True).rstrip()
    assert text == "Be short\nHello\nHi\nName a fruit\nIt is yellow"


def test_records_in_python_may_be_conversations() -> None:
    kind = CausalKind(tokenizer(CHATML))
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    record = {"input": "And?", "target": "Bye", "system": "Be short", "history": history}
    text = kind.tokenizer.decode(encoded_records([record], "a", kind)[0]["prompt_ids"])
    assert [part.split("<|im_end|>")[0] for part in text.split("\n") if part] == [
        "<|im_start|>system", "Be short", "<|im_start|>user", "Hello", "<|im_start|>assistant",
        "Hi", "<|im_start|>user", "And?", "<|im_start|>assistant",
    ]  # fmt: skip
