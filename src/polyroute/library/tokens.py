"""Which tokens of a layer's input are real, not padding."""

from torch import Tensor

from polyroute.layer.sites import Site

__all__ = ["real_tokens"]

ACROSS = ("EncDecAttention", "encoder_attn", "cross_attn", "cross_attention", "crossattention")
"""What base models call the attention of a decoder to what the encoder read."""
READING = ("k", "v", "k_proj", "v_proj", "key", "value")


def real_tokens(x: Tensor, mask: Tensor | None, site: Site) -> Tensor:
    """The rows `[n, d_in]` of a layer's input that are not padding.

    Args:
        x: the input, `[..., d_in]`.
        mask: the attention mask of the base model's call, `[B, L]`, or None. In an encoder-decoder
            model it is the encoder's, so it says nothing of tokens that the decoder writes.
        site: the layer.
    """
    if mask is None or mask.shape != x.shape[:-1] or not _sees_source(site.name):
        return x.flatten(0, -2)
    return x[mask.bool()]


def _sees_source(name: str) -> bool:
    """Whether a layer's input has the tokens that the mask is for."""
    parts = name.split(".")
    if any(part in ACROSS for part in parts):
        return parts[-1] in READING
    return "decoder" not in parts or "encoder" in parts
