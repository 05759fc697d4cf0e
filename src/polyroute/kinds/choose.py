"""The kinds there are, and which of them a base model is."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from polyroute.errors import InputError
from polyroute.kinds.base import ModelKind
from polyroute.kinds.causal import CausalKind
from polyroute.kinds.encoder import EncoderKind
from polyroute.kinds.objectives import Objective
from polyroute.kinds.seq2seq import Seq2SeqKind

__all__ = ["CausalKind", "EncoderKind", "ModelKind", "Seq2SeqKind", "kind_class", "kind_of"]


def kind_of(
    model_or_config: nn.Module | PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_input: int = 256,
    max_target: int = 64,
    objective: str | Objective = "lm",
) -> ModelKind:
    """The kind of a base model, by its own config.

    Args:
        model_or_config: a transformers model, its config, or a wrapper with the model as its
            `base_model`.
        tokenizer: the model's tokenizer.
        max_input: most tokens of a prompt.
        max_target: most tokens of a target or choice.
        objective: what it learns by: `"lm"`, `"t-few"`, `"superni"`, or an `Objective`.

    Raises:
        InputError: it is no transformers model or of no known architecture, or the tokenizer has
            no end token where one is needed, or the kind cannot learn by the objective.
    """
    config, architecture = _described(model_or_config)
    positions = getattr(config, "max_position_embeddings", None)
    return _class_of(config, architecture)(
        tokenizer,
        max_input=max_input,
        max_target=max_target,
        max_positions=positions if isinstance(positions, int) and positions > 0 else None,
        objective=objective,
    )


def kind_class(model_or_config: nn.Module | PreTrainedConfig) -> type[ModelKind]:
    """The class of the kind of a base model, by its own config.

    Raises:
        InputError: it is no transformers model or of no known architecture.
    """
    return _class_of(*_described(model_or_config))


def _described(model_or_config: nn.Module | PreTrainedConfig) -> tuple[PreTrainedConfig, str]:
    """The config, and the class name of the model where that is known."""
    if isinstance(model_or_config, PreTrainedConfig):
        return model_or_config, next(iter(model_or_config.architectures or []), "")
    # A transformers model has a `base_model` too: itself without its head.
    is_model = isinstance(model_or_config, PreTrainedModel)
    model = model_or_config if is_model else getattr(model_or_config, "base_model", None)
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"a {type(model_or_config).__name__} is of no known kind: give a transformers model"
        )
    return model.config, type(model).__name__


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
