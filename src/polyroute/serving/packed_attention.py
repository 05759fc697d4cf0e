"""Attention over packed rows for processors without flash attention.

transformers computes the attention of a packed row as one product of all queries with all keys, and
masks those of other requests. With 32 requests that is 32 times the work. Here each request's
queries meet its own keys: those of one token each in one batch, longer ones request by request.
docs/design.md has the measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (its name everywhere)

__all__ = ["NAME", "PackedRow", "can_pack", "register"]

NAME = "polyroute_packed"
"""What a base model's config calls this way to compute attention."""


@dataclass(frozen=True)
class PackedRow:
    """Where the queries and keys of each request lie in one forward."""

    queries: Sequence[int]
    """The first query of each request, and the number of all."""
    keys: Sequence[int]
    """The first key of each request, and the number of all."""

    @cached_property
    def single(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The S requests with one query; None if there are none.

        Returns:
            The places of the queries `[S]` and of up to M keys of each `[S, M]`, and a mask
            `[S, M]` that says which of these are its own.
        """
        spans = zip(pairwise(self.queries), pairwise(self.keys), strict=True)
        own = [(q, k, end - k) for (q, after), (k, end) in spans if after - q == 1]
        if not own:
            return None
        places, first, counts = (torch.tensor(each) for each in zip(*own, strict=True))
        steps = torch.arange(int(counts.max()))
        is_own = steps < counts[:, None]
        return places, torch.where(is_own, first[:, None] + steps, first[:, None]), is_own

    @cached_property
    def longer(self) -> list[tuple[slice, slice, Tensor | None]]:
        """The requests with more queries.

        Returns:
            Of each its queries, its keys, and a mask `[Q, K]` if keys of former forwards precede
            those of this one.
        """
        found = []
        for (q, after), (k, end) in zip(pairwise(self.queries), pairwise(self.keys), strict=True):
            if after - q > 1:
                earlier = (end - k) - (after - q)
                shape = torch.ones(after - q, end - k, dtype=torch.bool)
                found.append(
                    (slice(q, after), slice(k, end), shape.tril(earlier) if earlier else None)
                )
        return found


def can_pack(model: Any) -> bool:
    """Whether a model's attention can be computed in this way: on a CPU, and of the plain kind."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    return (
        model.device.type == "cpu"
        # What trains fastest is eager; a model that has no other way does more than the plain one.
        and model._supports_sdpa
        and config._attn_implementation in ("sdpa", "eager")
        and set(layers) == {"full_attention"}
        and getattr(config, "attn_logit_softcapping", None) is None
        and (getattr(config, "sliding_window", None) is None or "layer_types" in config)
    )


def register() -> None:
    """Make this way to compute attention known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def _attend(  # noqa: PLR0913 (transformers calls it so)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    packed_row: PackedRow,
    cache: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer.
        query: `[1, H, Q, D]` of all requests.
        key: `[1, H', Q, D]`, the new ones.
        value: `[1, H', Q, D]`.
        attention_mask: None.
        scaling: the factor of the logits.
        packed_row: where the requests lie.
        cache: the paged cache, which adds the earlier keys and values.
        **kwargs: what the cache needs.

    Returns:
        `[1, Q, H, D]`, and no weights.
    """
    del attention_mask
    key, value = cache.update(
        key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
    )
    q_HQD, k_GKD, v_GKD = query[0], key[0], value[0]
    out_QHD = q_HQD.new_empty(q_HQD.shape[1], q_HQD.shape[0], v_GKD.shape[-1])
    groups = len(k_GKD)
    if packed_row.single is not None:
        places, keys, is_own = packed_row.single
        k, v = (
            t.index_select(1, keys.view(-1)).view(groups, *keys.shape, -1) for t in (k_GKD, v_GKD)
        )
        q = (
            q_HQD.index_select(1, places)
            .transpose(0, 1)
            .reshape(len(places), groups, -1, q_HQD.shape[-1])
        )
        found = F.scaled_dot_product_attention(
            q, k.transpose(0, 1), v.transpose(0, 1), attn_mask=is_own[:, None, None], scale=scaling
        )
        out_QHD.index_copy_(0, places, found.reshape(len(places), len(q_HQD), -1))
    for own, of_own, mask in packed_row.longer:
        found = F.scaled_dot_product_attention(
            q_HQD[None, :, own], k_GKD[None, :, of_own], v_GKD[None, :, of_own], attn_mask=mask,
            is_causal=mask is None, scale=scaling, enable_gqa=True,
        )  # fmt: skip
        out_QHD[own] = found[0].transpose(0, 1)
    return out_QHD[None], None
