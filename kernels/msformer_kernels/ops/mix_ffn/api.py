"""The public function; its body is the check of its arguments (see `Operator.public`)."""

from __future__ import annotations

from torch import Tensor

from msformer_kernels.core.validation import check_norm, check_rank, check_shape
from msformer_kernels.ops.mix_ffn.reference import ACTIVATIONS, KERNEL_SIZES
from msformer_kernels.ops.mix_ffn.spec import OPERATOR


def check_image(x: Tensor, height: int, width: int) -> None:
    """x is `[B, height * width, C]`."""
    check_rank("x", x, "[B, N, C]", 3)
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, (float, str, tuple, list)):
            raise TypeError(f"{name}: expected a whole number, got {size!r}")
    if height < 0 or width < 0 or x.shape[1] != height * width:
        raise ValueError(f"x: has {x.shape[1]} tokens, expected height * width = {height} * {width} = {height * width}")


def check_activation(name: str, argument: str = "activation") -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"{argument}: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")


def check_kernel_size(size: int) -> None:
    if size not in KERNEL_SIZES:
        raise ValueError(f"kernel_size: expected one of {', '.join(map(str, KERNEL_SIZES))}, got {size!r}")


def check_taps(taps: Tensor, hidden: int) -> None:
    """The weight of the depthwise convolution is square, of one of the sizes."""
    size = taps.shape[2] if taps.dim() == 4 else 0
    if size not in KERNEL_SIZES or tuple(taps.shape) != (hidden, 1, size, size):
        sizes = " or ".join(map(str, KERNEL_SIZES))
        raise ValueError(
            f"dw_weight: expected [hidden, 1, k, k] = ({hidden}, 1, k, k) with k = {sizes}, got {tuple(taps.shape)}"
        )


def check_gate(hidden: int, hidden_norm_weight: Tensor | None) -> None:
    """What a gate asks of the other arguments."""
    if hidden % 2:
        raise ValueError(f"fc1_weight: has {hidden} rows, expected an even number, values and gates, as gated is True")
    if hidden_norm_weight is not None:
        raise ValueError("hidden_norm_weight: expected None, as gated is True")


@OPERATOR.public
def mix_ffn(
    x: Tensor,
    height: int,
    width: int,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    dw_weight: Tensor,
    dw_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    skip: bool = False,
    hidden_norm_weight: Tensor | None = None,
    hidden_norm_bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    activation: str = "gelu",
    inner_activation: str = "identity",
    residual: bool = False,
    gated: bool = False,
    backend: str | None = None,
) -> None:
    """Feed-forward layer that mixes neighbours: ``[x +] W_2 act([LN](dw(U) [+ U]))``, ``U = W_1 [LN](x)``.

    With a gate ``[x +] W_2 (Z_1 * act(Z_2))``, ``Z = dw(U) [+ U]``, its first and second half along the channels.

    MixFFN: Xie et al., "SegFormer", NeurIPS 2021. With ``skip`` and a hidden norm the MixFFN-skip of MISSFormer (Huang
    et al., 2021) and MS-Former; with a gate GLUMBConv of SANA (Xie et al., 2024). The compiled backends never write the
    hidden ``N x hidden`` tensor to memory, and save nothing for the backward but their inputs.

    Args:
        x: tokens ``[B, height * width, C]``, row by row, floating point, any strides.
        height, width: of the image.
        fc1_weight, fc1_bias: ``[hidden, C]``, ``[hidden]`` or None.
        dw_weight, dw_bias: depthwise convolution, zero padded to keep the size: ``[hidden, 1, k, k]`` with k = 3, 5 or
            7, ``[hidden]`` or None.
        fc2_weight, fc2_bias: ``[C, hidden]``, or ``[C, hidden / 2]`` if gated; ``[C]`` or None.
        skip: adds the input of the convolution to its output.
        hidden_norm_weight, hidden_norm_bias: ``[hidden]``; a LayerNorm before the activation, unless the weight is
        None.
        norm_weight, norm_bias: ``[C]``; a LayerNorm of x, unless the weight is None.
        norm_eps: of both norms.
        activation: ``"gelu"`` (exact, with erf), ``"gelu_tanh"``, ``"relu"``, ``"silu"``, ``"hardswish"``,
            ``"relu6"`` or ``"identity"``.
        inner_activation: after the first product, before the convolution; as `activation`.
        residual: adds x (before the norm) to the output.
        gated: `activation` is that of the gate, the second half of the hidden channels, whose number is even. There is
            no hidden norm then.
        backend: see `msformer_kernels.use_backend`.

    Returns:
        ``[B, height * width, C]`` in x's dtype (under autocast in autocast's, unless residual). An empty batch or image
        gives an empty output and zero gradients.

    Raises:
        ValueError: shapes or devices that do not fit, an unknown activation or backend, a gate with a hidden norm.
        TypeError: dtypes that are mixed (outside autocast) or not floating point.
        BackendError: the chosen backend is not available for the call.
    """
    check_image(x, height, width)
    channels, hidden = x.shape[2], fc1_weight.shape[0]
    check_shape("fc1_weight", fc1_weight, (hidden, channels), "[hidden, C]")
    check_shape("fc1_bias", fc1_bias, (hidden,), "[hidden]")
    check_taps(dw_weight, hidden)
    check_shape("dw_bias", dw_bias, (hidden,), "[hidden]")
    if gated:
        check_gate(hidden, hidden_norm_weight)
        check_shape("fc2_weight", fc2_weight, (channels, hidden // 2), "[C, hidden / 2]")
    else:
        check_shape("fc2_weight", fc2_weight, (channels, hidden), "[C, hidden]")
    check_shape("fc2_bias", fc2_bias, (channels,), "[C]")
    check_norm("hidden_norm", hidden_norm_weight, hidden_norm_bias, hidden)
    check_norm("norm", norm_weight, norm_bias, channels)
    check_activation(activation)
    check_activation(inner_activation, "inner_activation")
