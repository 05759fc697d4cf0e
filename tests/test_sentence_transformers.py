"""A routed encoder inside sentence-transformers gives the embeddings of the encoder kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from base_models import bert
from models import routed
from torch import nn

pytest.importorskip("sentence_transformers", minversion="6.0")

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

from polyroute import InputError
from polyroute.kinds.batches import evaluating
from polyroute.kinds.choose import kind_of
from polyroute.sentence_transformers import RoutedTransformer

TEXTS = ["the cat sat on the red mat", "a dog", "is it big", "the big red dog ran"]
TASKS = ["birch", "dune", "amber", "birch"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain sentence encoder with a tiny BERT."""
    place = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    model, tokenizer = bert()
    tokenizer.pad_token = "[UNK]"
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    transformer = Transformer(str(place))
    plain = SentenceTransformer(modules=[transformer, Pooling(16, "mean"), Normalize()])
    plain.save_pretrained(str(place / "plain"))
    return place / "plain"


def encoder(folder: Path, **config: Any) -> SentenceTransformer:
    plain = SentenceTransformer(str(folder), device="cpu")
    plain[0] = RoutedTransformer(plain[0], routed(plain[0].model, num_heads=4, **config))
    return plain


def of_kind(model: SentenceTransformer, texts: list[str], tasks: list[str]) -> np.ndarray:
    """What `EncoderKind` computes for the same texts."""
    kind = kind_of(model[0].model, model.tokenizer)
    inputs = kind.inputs(kind._target_ids(texts))
    with evaluating(model):
        return kind.embedded(model[0].model, inputs, tasks).numpy()


def test_embeddings_are_those_of_the_encoder_kind(folder: Path) -> None:
    model = encoder(folder)
    found = model.encode(TEXTS, task="birch")
    np.testing.assert_allclose(found, of_kind(model, TEXTS, ["birch"] * 4), atol=1e-6)
    with model[0].model.route("birch"):
        np.testing.assert_array_equal(model.encode(TEXTS), found)
    assert np.abs(model.encode(TEXTS, task="mu") - found).max() > 0.01
    assert np.abs(model.encode(TEXTS, task="dune") - found).max() > 0.01


def test_every_text_may_have_a_task_of_its_own(folder: Path) -> None:
    model = encoder(folder)
    mixed = [{"text": text, "task": task} for text, task in zip(TEXTS, TASKS, strict=True)]
    for batch_size in (2, 32):
        found = model.encode(mixed, batch_size=batch_size)
        np.testing.assert_allclose(found, of_kind(model, TEXTS, TASKS), atol=1e-6)
    np.testing.assert_allclose(model.encode(mixed[0]), found[0], atol=1e-6)


@pytest.mark.parametrize("tasks", [("amber", "birch"), ("query", "document", "birch")])
def test_queries_and_documents_have_the_tasks_that_are_routed(
    folder: Path, tasks: tuple[str, ...]
) -> None:
    model = encoder(folder, tasks=tasks)
    expected = of_kind(model, TEXTS, ["birch"] * 4)
    own = [{"text": text, "task": "birch"} for text in TEXTS]
    for encode in (model.encode_query, model.encode_document):
        with model[0].model.route("birch"):
            np.testing.assert_allclose(encode(TEXTS), expected, atol=1e-6)
        np.testing.assert_allclose(encode(own), expected, atol=1e-6)
        clash = "'(query|document)' is a kind of text" if "query" in tasks else "no task is routed"
        with pytest.raises(InputError, match=clash):
            encode(TEXTS)
    queries, documents = ({str(i): text for i, text in enumerate(TEXTS)} for _ in range(2))
    evaluator = InformationRetrievalEvaluator(queries, documents, {i: {i} for i in queries})
    with model[0].model.route("birch"):
        assert evaluator(model)["cosine_accuracy@1"] == 1


def test_a_saved_encoder_loads_with_its_inventory(folder: Path, tmp_path: Path) -> None:
    model = encoder(folder)
    model.save_pretrained(str(tmp_path / "out"))
    again = SentenceTransformer(str(tmp_path / "out"), device="cpu", trust_remote_code=True)
    assert isinstance(again[0], RoutedTransformer)
    assert again[0].model.tasks == model[0].model.tasks
    assert again.get_embedding_dimension() == 16
    for task in ("amber", "mu"):
        np.testing.assert_array_equal(
            again.encode(TEXTS, task=task), model.encode(TEXTS, task=task)
        )
    again.max_seq_length = 5
    assert again.tokenizer.model_max_length == 5
    assert again[0].preprocess(["the cat sat on the red mat"])["input_ids"].shape == (1, 5)


def test_the_folder_of_a_saved_encoder_is_a_plain_transformer_too(
    folder: Path, tmp_path: Path
) -> None:
    plain = SentenceTransformer(str(folder), device="cpu")
    expected = plain.encode(TEXTS)
    encoder(folder).save_pretrained(str(tmp_path / "out"))
    bare = Transformer(str(tmp_path / "out"))
    base = SentenceTransformer(modules=[bare, Pooling(16, "mean"), Normalize()], device="cpu")
    np.testing.assert_array_equal(base.encode(TEXTS), expected)


def test_what_cannot_be_routed_is_refused(folder: Path, tmp_path: Path) -> None:
    model = encoder(folder)
    with pytest.raises(InputError, match="no task is routed"):
        model.encode(TEXTS)
    with pytest.raises(InputError, match="unknown task 'oak'"):
        model.encode(TEXTS, task="oak")
    with pytest.raises(InputError, match="some texts have a task"):
        model.encode([{"text": "the cat sat", "task": "dune"}, "a dog"])
    with pytest.raises(InputError, match="leave out task='dune'"):
        model.encode([{"text": "a dog", "task": "dune"}], task="dune")
    with (
        model[0].model.route(TASKS),
        pytest.raises(InputError, match="sorts texts by length"),
    ):
        model.encode(TEXTS)
    other = encoder(folder)
    with pytest.raises(InputError, match="does not wrap the model of this encoder"):
        RoutedTransformer(model[0].transformer, other[0].model)
    with pytest.raises(InputError, match="has no folder 'inventory'"):
        RoutedTransformer.load(str(folder))
