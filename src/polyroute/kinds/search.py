"""The settings of greedy and beam search, which are the same for every base model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import GenerationConfig

from polyroute.kinds.batches import unwrapped

__all__ = ["PlainSearch", "plain_search"]

DECODER_STARTS = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""The tokens that an encoder-decoder begins its answers with."""


class PlainSearch(GenerationConfig):  # type: ignore[misc, unused-ignore]
    """Settings of `generate` that the base model's own generation config adds nothing to.

    `generate` fills each setting that is None from the base model's config, and None is the only
    neutral value of some, such as `stop_strings`. Here the library's defaults fill them.
    """

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """See `GenerationConfig.update`; with `defaults_only` the given values are ignored."""
        given = self._get_default_generation_params() if defaults_only else kwargs
        unused: dict[str, Any] = super().update(  # type: ignore[no-untyped-call]
            defaults_only=defaults_only, **given
        )
        return unused


def plain_search(
    model: nn.Module,
    *,
    ends: Sequence[int],
    pad: int,
    max_new_tokens: int,
    num_beams: int,
    starts: Mapping[str, int] | None = None,
) -> PlainSearch:
    """The settings of greedy or beam search with a model, which is not changed.

    Of the model's own generation config only ids of tokens are kept: those that end an answer, and
    in an encoder-decoder those that begin one.

    Args:
        model: the routed model, another wrapper with a `base_model`, or a transformers model.
        ends: the tokens that end an answer, besides those that the model's config names.
        pad: the id of the padding.
        max_new_tokens: the most tokens of an answer.
        num_beams: 1 for greedy search.
        starts: by setting, tokens that begin an answer whatever the model's config names.
    """
    base = unwrapped(model)[-1]
    own = getattr(base, "generation_config", None)
    its = getattr(own, "eos_token_id", None)
    stops = [*ends, *(its if isinstance(its, list | tuple) else [its])]
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    names = DECODER_STARTS if is_encoder_decoder else ()
    return PlainSearch(  # type: ignore[no-untyped-call]
        **{**{name: getattr(own, name, None) for name in names}, **(starts or {})},
        eos_token_id=list(dict.fromkeys(stop for stop in stops if stop is not None)),
        pad_token_id=pad,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
    )
