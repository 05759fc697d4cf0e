"""Finding the kind of a base model."""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from polyroute.errors import InputError
from polyroute.kinds.base import MAX_INPUT, MAX_TARGET, ModelKind
from polyroute.kinds.causal import CausalKind
from polyroute.kinds.chat import ChatTemplate
from polyroute.kinds.encoder import EncoderKind
from polyroute.kinds.objectives import Objective
from polyroute.kinds.seq2seq import Seq2SeqKind

__all__ = [
    "CausalKind",
    "ChatTemplate",
    "EncoderKind",
    "ModelKind",
    "Seq2SeqKind",
    "kind_class",
    "kind_of",
]

AFTER_PADDING = {
    "camembert", "data2vec-text", "esm", "ibert", "longformer", "luke", "mpnet", "roberta",
    "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""The types of models that number positions from the padding id on, as RoBERTa does."""


def kind_of(
    model_or_config: nn.Module | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_input: int = MAX_INPUT,
    max_target: int = MAX_TARGET,
    objective: str | Objective = "lm",
    prompt: str | ChatTemplate = "auto",
) -> ModelKind:
    """Make the kind of a base model, as its config says.

    Args:
        model_or_config: a transformers model, its config, or a wrapper with the model as its
            `base_model`.
        tokenizer: the model's tokenizer.
        max_input: the most tokens of a prompt.
        max_target: the most tokens of a target or choice.
        objective: the loss: `"lm"`, `"t-few"`, `"superni"`, or an `Objective`.
        prompt: how a decoder-only model is prompted: by its chat template (`"chat"`, or a
            `ChatTemplate`), by the text alone (`"plain"`), or by its template if it has one
            (`"auto"`).

    Raises:
        InputError: the model is no transformers model or has an unknown architecture, the tokenizer
            lacks an end token or a chat template that is needed, or the kind does not support the
            objective or the prompt.
    """
    config, architecture = _described(model_or_config)
    found = _class_of(config, architecture)
    chat: dict[str, Any] = {"prompt": prompt} if issubclass(found, CausalKind) else {}
    if not chat and prompt not in ("auto", "plain"):
        raise InputError(
            f"a chat template is for decoder-only models, and this one is {found.name}: use "
            "prompt='plain'"
        )
    return found(
        tokenizer,
        **chat,
        max_input=max_input,
        max_target=max_target,
        max_positions=_usable_positions(config),
        objective=objective,
    )


def kind_class(model_or_config: nn.Module | PreTrainedConfig) -> type[ModelKind]:
    """The class of a base model's kind, as its config says.

    Raises:
        InputError: the model is no transformers model or has an unknown architecture.
    """
    return _class_of(*_described(model_or_config))


def _described(model_or_config: nn.Module | PreTrainedConfig) -> tuple[PreTrainedConfig, str]:
    """The config, and the class name of the model if it is known."""
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config, next(iter(model_or_config.architectures or []), "")
    # A transformers model has a `base_model` too: the model without its head.
    is_model = isinstance(model_or_config, PreTrainedModel)
    model = model_or_config if is_model else getattr(model_or_config, "base_model", None)
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model_or_config).__name__} is of no known kind: give a transformers model"
        )
    return model.config, type(model).__name__


def _usable_positions(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model has positions for; None if its config sets no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.model_type in AFTER_PADDING:
        return positions - 1 - (config.pad_token_id or 0)
    return positions


def _class_of(config: PreTrainedConfig, architecture: str) -> type[ModelKind]:
    if config.is_encoder_decoder:
        return Seq2SeqKind
    is_decoder = getattr(config, "is_decoder", False)
    if is_decoder or architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return CausalKind
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return EncoderKind
    if not architecture and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return CausalKind
    raise InputError(
        f"base model architecture {architecture or config.model_type!r} is not supported: use an "
        "encoder-decoder, a model with a language-model head (...ForCausalLM), or an encoder "
        "such as BERT"
    )
