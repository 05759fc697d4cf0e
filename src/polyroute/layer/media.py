"""Models that also see images or hear sounds: which layers do, and which example each belongs to.

A vision-language model runs its vision tower over all images of the batch at once. Examples may
have different numbers of images, so the first axis of such a layer's input does not count examples.
Even if its length is a multiple of their number, images may belong to other examples than it seems.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["media_fit_examples", "media_modules"]

PLACEHOLDER = re.compile(r"(image|video|audio|speech)_token_(id|index)")
"""The settings of a model that name a token for an image or a sound in the text."""
MEDIA = re.compile(r"pixel|image|video|audio|input_features|input_values|speech")
"""The arguments of a forward that hold images or sounds."""


def media_modules(model: nn.Module) -> set[int]:
    """The identities of all modules outside the language part of a multimodal model.

    The set is empty if the model takes text alone, or if its language part cannot be recognised.
    """
    found: set[int] = set()
    for part in model.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "text_config", None) is not None and _placeholders(config):
            found |= _outside_language(part, config.text_config)
            break
    return found


def _outside_language(model: nn.Module, text: Any) -> set[int]:
    """The modules outside the language part of a model, which is built from `text`."""
    language: set[int] = set()
    around: set[int] = set()
    parts = {
        name: module
        for name, module in model.named_modules()
        if module is not model and type(getattr(module, "config", None)) is type(text)
    }
    for name, module in parts.items():
        language |= {id(child) for child in module.modules()}
        ancestors = name.split(".")
        around |= {id(model.get_submodule(".".join(ancestors[:i]))) for i in range(len(ancestors))}
    if not language:
        return set()
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return {id(m) for m in model.modules()} - language - around - {id(output)}


def _placeholders(config: Any) -> list[int]:
    """The tokens that stand for images and sounds in the text."""
    found = (value for name, value in vars(config).items() if PLACEHOLDER.fullmatch(name))
    return [value for value in found if isinstance(value, int)]


def media_fit_examples(model: nn.Module, inputs: Mapping[str, Any], num_examples: int) -> bool:
    """Whether every example is known to have the same number of images or sounds, of one size.

    The inputs of the layers that see them then hold the examples in order, each with the same
    number of consecutive vectors.

    Args:
        model: the base model.
        inputs: the arguments of its forward, by name.
        num_examples: the number of examples.
    """
    ids = inputs.get("input_ids")
    media = [
        value
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.dim() and MEDIA.search(name)
    ]
    if not isinstance(ids, Tensor) or not media or len(ids) % num_examples:
        return False
    configs = (getattr(part, "config", None) for part in model.modules())
    tokens = next(
        (t for config in configs if config is not None and (t := _placeholders(config))), []
    )
    for token in tokens:
        counts = (ids == token).sum(1)
        if bool((counts != counts[0]).any()):
            return False
    # The sizes of the images are integer tensors with an entry for each image. An image of another
    # size would have another number of patches.
    sizes = [value for value in media if not torch.is_floating_point(value)]
    same = all(bool((value == value[:1]).all()) for value in sizes)
    return same and all(len(value) % num_examples == 0 for value in media)
