"""How a layer applies (IA)^3: a scale of every output unit."""

from torch import Tensor, nn

from polyroute.layer.segments import Segments

__all__ = ["apply_ia3"]


def apply_ia3(
    base: nn.Module, x: Tensor, scale: Tensor, segments: Segments | None = None
) -> Tensor:
    """base(x) times a scale for each output unit, bias included ((IA)^3).

    Args:
        base: the frozen layer.
        x: `[..., d_in]`, as in `polyroute.layer.kernels.apply_lora`.
        scale: `[1, d_out]` or `[B, 1, d_out]`.
        segments: as in `polyroute.layer.kernels.apply_lora`.
    """
    y: Tensor = base(x)
    scale = scale.to(y.dtype)
    if scale.dim() == 2:
        return y * scale.squeeze(0)
    if segments is not None:
        return (y.reshape(-1, y.shape[-1]) * segments.spread(scale.squeeze(1))).view(y.shape)
    return (y.reshape(scale.shape[0], -1, y.shape[-1]) * scale).view(y.shape)
