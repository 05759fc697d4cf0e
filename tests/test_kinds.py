import os
import pickle
import subprocess
import sys
import warnings
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
    every_model,
    gpt2,
    llama,
    made,
    t5,
    text_model,
    word_tokenizer,
)
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    ByT5Tokenizer,
    MPNetConfig,
    PreTrainedModel,
    ViTConfig,
)

from polyroute.errors import InputError
from polyroute.kinds.choose import AFTER_PADDING, CausalKind, EncoderKind, Seq2SeqKind, kind_of
from polyroute.study.examples import encoded_records

# Choosing the kind


@every_model
def test_a_model_its_config_and_its_wrapper_are_of_one_kind(make: Maker) -> None:
    model, tokenizer = make()
    kinds = {type(kind_of(m, tokenizer)) for m in (model, model.config, Routed(model))}
    expected = {t5: Seq2SeqKind, llama: CausalKind, gpt2: CausalKind, bert: EncoderKind}
    assert kinds == {expected[make]}


def test_masked_language_models_are_encoders() -> None:
    config = MPNetConfig(architectures=["MPNetForMaskedLM"])
    assert isinstance(kind_of(config, word_tokenizer(frame=True)), EncoderKind)


def test_an_unknown_architecture_is_named() -> None:
    config = ViTConfig(architectures=["ViTForImageClassification"])
    with pytest.raises(InputError, match="'ViTForImageClassification' is not supported: use"):
        kind_of(config, ByT5Tokenizer())


def test_a_model_that_is_not_of_transformers_is_refused() -> None:
    with pytest.raises(InputError, match="a Linear is of no known kind: give a transformers"):
        kind_of(nn.Linear(2, 2), ByT5Tokenizer())


def test_a_kind_that_writes_needs_an_end_token() -> None:
    with pytest.raises(InputError, match=r"set tokenizer\.eos_token"):
        CausalKind(word_tokenizer(frame=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_target": 1}, "max_target must be at least 2, not 1"),
        ({"max_input": None}, "max_input must be a whole number, not None"),
        ({"max_input": 2.5}, r"max_input must be a whole number, not 2\.5"),
    ],
)
def test_lengths_that_are_none_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Seq2SeqKind(ByT5Tokenizer(), **given)


# Encoding


def test_encode_gives_prompt_target_choices_and_label() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    encoded = Seq2SeqKind(tokenizer).encode(
        columns(
            ("a", "Do.", "this", "yes", ["no", "yes"]),
            ("b", "", "that", "free text", None),
            ("c", "Do.", "", "off the list", ["no"]),
        )
    )

    def ids(*texts: str) -> list[list[int]]:
        return [tokenizer(text)["input_ids"] for text in texts]

    assert encoded == {
        "task": ["a", "b", "c"],
        "prompt_ids": ids("Do.\nthis", "that", "Do."),
        "target_ids": ids("yes", "free text", "off the list"),
        "choice_ids": [ids("no", "yes"), [], ids("no")],
        "label": [1, -1, -1],
        "prompt_cut": [0, 0, 0],
        "target_cut": [0, 0, 0],
    }


def test_the_causal_prompt_ends_in_a_newline_and_has_no_end_token() -> None:
    _, kind = made(llama)
    row = as_rows(kind.encode(columns(("a", "Do.", "this", "yes", None))))[0]
    assert kind.tokenizer.decode(row["prompt_ids"]) == "Do.\nthis\n"
    assert kind.tokenizer.decode(row["target_ids"]) == "yes</s>"


@pytest.mark.parametrize("bos", [False, True])
def test_a_bos_is_added_where_the_tokenizer_adds_one_and_survives_the_cut(bos: bool) -> None:
    kind = CausalKind(word_tokenizer(frame=False, bos=bos), max_input=3, max_target=3)
    row = as_rows(kind.encode(columns(("a", "", "one two three cat dog", "yes", None))))[0]
    ids = kind.collate([row])["input_ids"][0]
    expected = "<s> three cat dog yes </s>" if bos else "two three cat dog yes </s>"
    assert kind.tokenizer.decode(ids) == expected


def test_a_long_seq2seq_input_keeps_its_end_token_and_a_long_target_does_not() -> None:
    _, kind = made(t5, max_input=4, max_target=3)
    row = as_rows(kind.encode(columns(("a", "", "abcdefgh", "vwxyz", ["vwxyz"]))))[0]
    texts = [kind.tokenizer.decode(i) for i in (row["prompt_ids"], row["target_ids"])]
    assert texts == ["abc</s>", "vwx"]  # it would learn to stop at the end token
    assert (row["prompt_cut"], row["target_cut"]) == (5, 3)
    assert row["choice_ids"] == [row["target_ids"]]


def test_a_long_encoder_input_keeps_its_frame() -> None:
    _, kind = made(bert, max_input=4)
    row = as_rows(kind.encode(columns(("a", "", "one two three cat", "yes", None))))[0]
    assert kind.tokenizer.decode(row["prompt_ids"]) == "[CLS] one two [SEP]"


@pytest.mark.parametrize(("max_input", "positions"), [(6, 512), (100, 10)])
def test_the_prompt_loses_its_beginning_before_the_target_loses_anything(
    max_input: int, positions: int
) -> None:
    torch.manual_seed(0)
    model, tokenizer = llama(positions)
    kind = kind_of(model, tokenizer, max_input=max_input, max_target=4)
    row = as_rows(kind.encode(columns(("a", "", "0123456789", "abc", None))))[0]
    batch = kind.collate([row])
    assert tokenizer.decode(batch["input_ids"][0]) == "56789\nabc</s>"
    assert tokenizer.decode(batch["labels"][0, 6:]) == "abc</s>"
    assert (batch["labels"][0, :6] == -100).all()


def test_every_choice_of_a_row_is_scored_after_the_same_cut_prompt() -> None:
    model, kind = made(llama, max_input=6, max_target=6)
    data = columns(("a", "", "0123456789", "a", ["a", "abcde"]), ("a", "", "789", "a", ["a"]))
    long, short = as_rows(kind.encode(data))
    short["prompt_ids"] = long["prompt_ids"][-6:]  # what room for "abcde" and its end leaves
    assert_close(kind.scores(model, [long])[0][:1], kind.scores(model, [short])[0])


# Encoding under datasets


CAUSAL = {"llama": llama, "gpt2": gpt2}
FINGERPRINT = """
import sys
from pathlib import Path
from datasets import Dataset
from polyroute.kinds.choose import CausalKind
from transformers import AutoTokenizer
for folder in map(Path, sys.argv[1:]):
    kind = CausalKind(AutoTokenizer.from_pretrained(folder / "tokenizer"), max_input=8)
    data = Dataset.load_from_disk(folder / "data")
    data = data.map(kind.encode, batched=True, remove_columns=data.column_names,
                    features=kind.features)
    print(data.cache_files[0]["filename"])
"""


def mapped(folder: Path, max_input: int, tokenizer: Any) -> Path:
    """The file that encoding in this process writes, or finds."""
    kind = CausalKind(tokenizer, max_input=max_input)
    data = Dataset.load_from_disk(folder / "data")
    data = data.map(
        kind.encode, batched=True, remove_columns=data.column_names, features=kind.features
    )
    return Path(data.cache_files[0]["filename"])


def test_a_second_map_reads_the_cache_also_in_another_process(tmp_path: Path) -> None:
    found, folders = [], [tmp_path / name for name in CAUSAL]
    for folder in folders:
        CAUSAL[folder.name]()[1].save_pretrained(folder / "tokenizer")
        Dataset.from_dict(EXAMPLES).save_to_disk(folder / "data")
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
        found.append(mapped(folder, 8, tokenizer))
        tokenizer(["a cat"] * 2, truncation=True, max_length=1)  # leaves its mark on the tokenizer
        assert mapped(folder, 8, tokenizer) == found[-1]
        assert mapped(folder, 9, tokenizer) != found[-1]
    written = [file.stat().st_mtime_ns for file in found]
    other = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, *folders], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"},
    )  # fmt: skip
    assert other.stdout.split() == list(map(str, found))
    assert [file.stat().st_mtime_ns for file in found] == written


def test_choices_may_begin_after_the_first_thousand_rows() -> None:
    kind = made(bert)[1]
    data = Dataset.from_dict(
        columns(*[("a", "", "cat", "yes", None)] * 1000, ("b", "", "dog", "no", ["yes", "no"]))
    )
    encoded = data.map(
        kind.encode, batched=True, remove_columns=data.column_names, features=kind.features
    )
    assert as_rows(kind.encode(data[998:1001])) == [encoded[i] for i in range(998, 1001)]


@every_model
def test_a_kind_survives_pickling(make: Maker) -> None:
    kind = made(make)[1]
    assert pickle.loads(pickle.dumps(kind)).encode(EXAMPLES) == kind.encode(EXAMPLES)


# Loss


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_causal_loss_is_the_mean_over_target_tokens(make: Maker) -> None:
    model, kind = made(make)
    rows = as_rows(kind.encode(EXAMPLES))
    losses = []
    for row in rows:
        ids = torch.tensor(row["prompt_ids"] + row["target_ids"])
        start = len(row["prompt_ids"])
        logits = model.base_model(input_ids=ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="none"))
    assert_close(kind.loss(model, kind.collate(rows)), torch.cat(losses).mean())
    assert model.seen == [EXAMPLES["task"]]


def test_the_seq2seq_loss_is_the_mean_over_target_tokens() -> None:
    model, kind = made(t5)
    rows = as_rows(kind.encode(EXAMPLES))
    losses = []
    for row in rows:
        target = torch.tensor(row["target_ids"])
        shifted = torch.tensor([[0, *row["target_ids"][:-1]]])
        prompt = torch.tensor([row["prompt_ids"]])
        logits = model.base_model(input_ids=prompt, decoder_input_ids=shifted).logits[0]
        losses.append(F.cross_entropy(logits, target, reduction="none"))
    assert_close(kind.loss(model, kind.collate(rows)), torch.cat(losses).mean())
    assert model.seen == [EXAMPLES["task"]]


def embedding(model: PreTrainedModel, ids: list[int]) -> Tensor:
    state = model(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
    return state / state.norm()


def test_the_encoder_loss_is_cross_entropy_of_scaled_cosines_over_the_choices_of_the_row() -> None:
    model, kind = made(bert)
    assert isinstance(kind, EncoderKind)
    rows = as_rows(kind.encode(EXAMPLES))
    expected = []
    for row in rows:
        prompt = embedding(model.base_model, row["prompt_ids"])
        choices = [embedding(model.base_model, ids) for ids in row["choice_ids"]]
        cosines = torch.stack([prompt @ choice for choice in choices])
        expected.append(F.cross_entropy(kind.scale * cosines, torch.tensor(row["label"])))
    assert_close(kind.loss(model, kind.collate(rows)), torch.stack(expected).mean())


def test_the_encoder_embeds_a_label_set_once_per_task_and_batch() -> None:
    model, kind = made(bert)
    data = columns(
        *[("truth", "", "cat", "yes", ["no", "yes"])] * 3, ("other", "", "cat", "no", ["no"])
    )
    kind.loss(model, kind.collate(as_rows(kind.encode(data))))
    assert model.seen == [["truth"] * 3 + ["other"], ["truth", "truth", "other"]]


@every_model
def test_every_loss_has_finite_gradients(make: Maker) -> None:
    model, kind = made(make)
    kind.loss(model, kind.collate(as_rows(kind.encode(EXAMPLES)))).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(g.isfinite().all() for g in gradients)


# Scores


@every_model
def test_scores_of_a_batch_equal_scores_one_by_one(make: Maker) -> None:
    model, kind = made(make)
    rows = as_rows(kind.encode(EXAMPLES))
    together = kind.scores(model, rows)
    assert [tuple(s.shape) for s in together] == [(3, 2), (2, 2), (4, 2), (2, 2)]
    assert all(s.dtype == torch.float32 for s in together)
    alone = [kind.scores(model, [row])[0] for row in rows]
    assert_close(together, alone)


@every_model
def test_scores_do_not_depend_on_the_other_choices(make: Maker) -> None:
    model, kind = made(make)
    row = as_rows(kind.encode(EXAMPLES))[0]
    each = [
        kind.scores(model, [{**row, "choice_ids": [choice]}])[0] for choice in row["choice_ids"]
    ]
    assert_close(kind.scores(model, [row])[0], torch.cat(each))


@text_model
def test_the_score_of_the_target_is_minus_the_loss_times_its_tokens(make: Maker) -> None:
    model, kind = made(make)
    for row in as_rows(kind.encode(EXAMPLES)):
        loss = kind.loss(model, kind.collate([row]))
        score = kind.scores(model, [row])[0][row["label"]]
        assert_close(score, torch.stack([-loss * len(row["target_ids"]), -loss]))


@pytest.mark.parametrize("make", [t5, llama])
def test_each_row_of_a_scoring_forward_has_the_task_of_its_row(make: Maker) -> None:
    model, kind = made(make)
    kind.scores(model, as_rows(kind.encode(EXAMPLES)))
    flat = ["where"] * 3 + ["truth"] * 2 + ["count"] * 4 + ["truth"] * 2
    if make is t5:
        assert model.seen == [EXAMPLES["task"], flat]
    else:  # choices share the row of their prompt, once it is known that the model can do so
        assert model.seen[-1] == EXAMPLES["task"]
        assert all(set(seen) == {"where"} for seen in model.seen[:-1])


@every_model
def test_scoring_switches_dropout_off_and_the_mode_back(make: Maker) -> None:
    model, kind = made(make)
    rows = as_rows(kind.encode(EXAMPLES))
    expected = kind.scores(model, rows)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    frozen.eval()
    scores = kind.scores(model, rows)
    assert_close(scores, expected, rtol=0, atol=0)
    assert not any(s.requires_grad for s in scores)
    assert [m for m in model.modules() if not m.training] == [frozen]


@every_model
def test_a_row_without_choices_cannot_be_scored(make: Maker) -> None:
    model, kind = made(make)
    rows = as_rows(kind.encode(columns(("free", "", "cat", "dog", None))))
    with pytest.raises(InputError, match="task 'free' has a row without choices: use a text-gen"):
        kind.scores(model, rows)


def test_an_encoder_cannot_learn_from_a_row_without_choices_or_with_a_target_off_them() -> None:
    _, kind = made(bert)
    free = as_rows(kind.encode(columns(("free", "", "cat", "dog", None))))
    with pytest.raises(InputError, match="task 'free' has a row without choices"):
        kind.collate(free)
    off = as_rows(kind.encode(columns(("odd", "", "cat", "dog", ["yes", "no"]))))
    with pytest.raises(InputError, match="task 'odd' is not one of its choices"):
        kind.collate(off)


@pytest.mark.parametrize("pad", [1, 3])
@pytest.mark.parametrize("family", sorted(AFTER_PADDING - {"esm", "mpnet", "xmod"}))
def test_positions_that_begin_after_the_padding_are_all_that_a_text_can_use(
    family: str, pad: int
) -> None:
    tokenizer = word_tokenizer(frame=True)
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, max_position_embeddings=36, pad_token_id=pad,
    )  # fmt: skip
    model = AutoModel.from_config(config).eval()
    kind = kind_of(config, tokenizer)
    assert kind.max_input == kind_of(model, tokenizer).max_input == 36 - pad - 1
    rows = as_rows(kind.encode(columns(("a", "", "cat " * 60, "yes", ["yes", "no"]))))
    assert kind.scores(Routed(model), rows)[0].isfinite().all()


# Generation


@text_model
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_of_a_batch_equals_generation_one_by_one(make: Maker, num_beams: int) -> None:
    model, kind = made(make)
    rows = as_rows(kind.encode(EXAMPLES))

    def texts(some: list[dict[str, Any]]) -> list[str]:
        return kind.generate(model, some, max_new_tokens=6, num_beams=num_beams)

    together = texts(rows)
    assert together == [text for row in rows for text in texts([row])]
    assert len(set(together)) > 1
    assert model.seen[0] == EXAMPLES["task"]


def test_generation_greedily_continues_the_prompt() -> None:
    model, kind = made(gpt2)
    row = as_rows(kind.encode(EXAMPLES))[0]
    ids = list(row["prompt_ids"])
    for _ in range(5):
        ids.append(int(model.base_model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = kind.tokenizer.decode(ids[len(row["prompt_ids"]) :], skip_special_tokens=True)
    assert kind.generate(model, [row], max_new_tokens=5) == [expected.strip()]


SHIPPED: dict[str, Any] = {
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": list(range(5, 15)),
    "forced_eos_token_id": 3,
    "min_length": 30,
    "do_sample": True,
    "temperature": 9.0,
    "return_dict_in_generate": True,
    "stop_strings": ["a"],
    "num_return_sequences": 1,
    "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static",
    "a setting of the future": 1,
}


@text_model
@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_the_base_ships_for_generation_changes_no_answer(make: Maker, num_beams: int) -> None:
    model, kind = made(make)
    rows = as_rows(kind.encode(EXAMPLES))
    plain = kind.generate(model, rows, max_new_tokens=6, num_beams=num_beams)
    own = model.base_model.generation_config
    for name, value in SHIPPED.items():
        setattr(own, name, value)
    shipped = own.to_dict()
    assert kind.generate(model, rows, max_new_tokens=6, num_beams=num_beams) == plain
    assert model.base_model.generation_config is own
    assert own.to_dict() == shipped


def test_an_answer_ends_at_the_end_tokens_of_the_tokenizer_and_of_the_base() -> None:
    model, kind = made(gpt2)
    row = as_rows(kind.encode(EXAMPLES))[0]

    def words() -> list[str]:
        return kind.generate(model, [row], max_new_tokens=6)[0].split()  # one token each

    whole = words()
    last = next(word for word in whole if word != whole[0])
    ended = whole[: whole.index(last) + 1]
    assert len(ended) < len(whole)
    end = kind.tokenizer.convert_tokens_to_ids(last)
    for ends in ([0, end], end):
        model.base_model.generation_config.eos_token_id = ends
        assert words() == ended
    model.base_model.generation_config.eos_token_id = None
    kind.tokenizer.eos_token = last
    assert words() == ended


def test_an_encoder_decoder_keeps_the_tokens_that_begin_its_answers() -> None:
    model, kind = made(t5)
    row = as_rows(kind.encode(EXAMPLES))[:1]
    assert not kind.generate(model, row, max_new_tokens=4)[0].startswith("b")
    model.base_model.generation_config.forced_bos_token_id = ord("b") + 3  # as mBART's language
    assert kind.generate(model, row, max_new_tokens=4)[0].startswith("b")


def test_a_prompt_without_room_for_what_is_generated_is_refused_and_never_cut() -> None:
    model, kind = made(gpt2, max_input=100, max_target=8)  # 64 positions
    row = as_rows(kind.encode(columns(("a", "", "cat dog " * 60, "yes", None))))[0]
    room = 64 - len(row["prompt_ids"])
    assert kind.generate(model, [row], max_new_tokens=room)
    with pytest.raises(InputError, match=f"task 'a'.*no room for max_new_tokens={room + 1}"):
        kind.generate(model, [row], max_new_tokens=room + 1)


def test_an_answer_ends_where_the_positions_do_whatever_is_beside_it() -> None:
    model, kind = made(gpt2, max_input=100, max_target=20)  # 64 positions
    data = columns(("a", "", "cat dog " * 60, "yes", None), ("a", "", "cat", "yes", None))
    rows = as_rows(kind.encode(data))
    assert 64 - len(rows[0]["prompt_ids"]) < 20
    asked: list[tuple[int, int]] = []
    search = kind._search

    def seen(model: Any, inputs: Any, *args: Any, **given: Any) -> Any:
        asked.append((inputs["input_ids"].shape[1], given["max_new_tokens"]))
        return search(model, inputs, *args, **given)

    kind._search = seen  # type: ignore[method-assign]
    texts = kind.generate(model, rows)
    lengths = [len(row["prompt_ids"]) for row in rows]
    assert asked == [(lengths[0], 64 - lengths[0]), (lengths[1], 20)]
    assert texts == [kind.generate(model, [row])[0] for row in rows]


def test_an_encoder_has_no_generation() -> None:
    model, kind = made(bert)
    assert not kind.supports_generation
    with pytest.raises(InputError, match="has no generation; use tasks with choices"):
        kind.generate(model, as_rows(kind.encode(EXAMPLES)))


# Nothing is cut in silence


@pytest.mark.parametrize("make", [t5, llama])
def test_what_was_cut_is_said_with_its_number_and_setting(make: Maker) -> None:
    _, kind = made(make, max_input=8, max_target=8)
    given = [
        {"instruction": "Do", "input": "it " * count, "target": "yes " * length}
        for count, length in ((1, 1), (9, 1), (20, 7), (1, 3))
    ]
    with pytest.warns(UserWarning, match="too long") as caught:
        rows = encoded_records(given, "a", kind)
    cut = [max(row["prompt_cut"] for row in rows), max(row["target_cut"] for row in rows)]
    said = [str(warning.message) for warning in caught]
    assert said == [
        f"2 of 4 prompts are too long, by up to {cut[0]} tokens, and {kind.cut_part} is left out: "
        "raise max_input, which is 8",
        f"2 of 4 answers are too long, by up to {cut[1]} tokens, and the rest is left out: raise "
        "max_target, which is 8",
    ]


@pytest.mark.parametrize(
    ("make", "prompt", "limits", "remedy"),
    [
        (gpt2, "chat", (40, 30), "lower max_target, which is 30"),
        (gpt2, "chat", (40, 24), "raise max_input, which is 40, and lower max_target, which is 24"),
        (gpt2, "chat", (30, 24), "raise max_input, which is 30"),
        (gpt2, "plain", (60, 30), "so shorten the examples"),
        (bert, "plain", (99, 30), "the base model has 32 positions, so shorten the examples"),
    ],
)
def test_what_is_said_to_help_with_long_prompts_does(
    make: Maker, prompt: str, limits: tuple[int, int], remedy: str
) -> None:
    torch.manual_seed(0)
    model, tokenizer = make()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    most_input, most_target = limits
    chosen = {"max_input": most_input, "max_target": most_target}
    kind = kind_of(model, tokenizer, prompt=prompt, **chosen)
    given = [{"input": "cat dog " * 45, "target": "yes"}]
    with pytest.warns(UserWarning, match=f"{remedy}$"):
        before = len(encoded_records(given, "a", kind)[0]["prompt_ids"])
    if "shorten" not in remedy:
        for name, step in (("raise max_input", 2), ("lower max_target", -2)):
            chosen[name.split()[1]] += step * (name in remedy)
        kind = kind_of(model, tokenizer, prompt=prompt, **chosen)
        with pytest.warns(UserWarning, match="too long"):
            assert len(encoded_records(given, "a", kind)[0]["prompt_ids"]) > before


def test_an_instruction_stays_where_the_input_is_cut() -> None:
    _, kind = made(llama, max_input=16, max_target=4)
    given = [{"instruction": "Do this", "input": "a long story", "target": "yes"}]
    with pytest.warns(UserWarning, match="1 of 1 prompts"):
        row = encoded_records(given, "a", kind)[0]
    assert kind.tokenizer.decode(row["prompt_ids"]) == "Do this\ng story\n"


def test_what_is_short_enough_is_not_spoken_of() -> None:
    _, kind = made(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoded_records([{"input": "short", "target": "yes"}], "a", kind)
