"""Argument checks of the operators, the same for the native and the reference path.

Every message names the operator, the argument, and the expected and the actual value. A wrong type or dtype is a
TypeError; a wrong shape, device or value is a ValueError.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# float32 goes from 1e-38 to 3e38. It must hold three things: log2(e) / temperature, the rate of the exponential, with
# its rounding error, 7 decades below; 300 * temperature, the largest difference of logits that matters; and the slope
# of the entropy's gradient, (1 / temperature)^2 times the incoming gradient and 1 / V. The last is the tightest:
# these limits leave 14 decades for the other factors, upwards and downwards. csrc/check.h has the same limits.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-12, 1e12


def float_tensor(operator: str, name: str, value: object) -> None:
    """``value`` must be a tensor of one of the four dtypes that the operators accept."""
    _dtype(operator, name, value, FLOAT_DTYPES, "a float32, bfloat16, float16 or float64")


def bool_tensor(operator: str, name: str, value: object) -> None:
    """``value`` must be a bool tensor."""
    _dtype(operator, name, value, (torch.bool,), "a bool")


def float64_tensor(operator: str, name: str, value: object) -> None:
    """``value`` must be a float64 tensor."""
    _dtype(operator, name, value, (torch.float64,), "a float64")


def int64_tensor(operator: str, name: str, value: object) -> None:
    """``value`` must be an int64 tensor."""
    _dtype(operator, name, value, (torch.int64,), "an int64")


def _dtype(operator: str, name: str, value: object, allowed: tuple[torch.dtype, ...], words: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{operator}: {name} must be {words} tensor, got {type(value).__name__}")
    if value.dtype not in allowed:
        raise TypeError(f"{operator}: {name} must be {words} tensor, got {_name(value.dtype)}")


def dimensions(operator: str, name: str, value: Tensor, shape: str, count: int) -> None:
    """``value`` must have ``count`` dimensions. ``shape`` is the contract's notation for them, e.g. ``[B, T]``."""
    if value.dim() != count:
        raise ValueError(f"{operator}: {name} must have {count} dimensions {shape}, got shape {list(value.shape)}")


def same_shape(operator: str, name: str, value: Tensor, shape: torch.Size, whose: str) -> None:
    """``value`` must have exactly ``shape``, which is the shape of ``whose``. Nothing broadcasts."""
    if value.shape != shape:
        raise ValueError(
            f"{operator}: {name} must have the shape of {whose}, {list(shape)}, got shape {list(value.shape)}"
        )


def same_device(operator: str, name: str, value: Tensor, device: torch.device, whose: str) -> None:
    """``value`` must be on ``device``, which is that of ``whose``."""
    if value.device != device:
        raise ValueError(f"{operator}: {name} must be on the device of {whose}, {device}, got {value.device}")


def alike(operator: str, values: dict[str, Tensor], first: Tensor, whose: str) -> None:
    """Each of the ``values`` must have the shape and the device of ``first``, whose name is ``whose``."""
    for name, value in values.items():
        same_shape(operator, name, value, first.shape, whose)
        same_device(operator, name, value, first.device, whose)


def same_dtype(operator: str, name: str, value: Tensor, dtype: torch.dtype, whose: str) -> None:
    """``value`` must have ``dtype``, which is that of ``whose``."""
    if value.dtype != dtype:
        raise TypeError(f"{operator}: {name} must have the dtype of {whose}, {_name(dtype)}, got {_name(value.dtype)}")


def number(operator: str, name: str, value: object, words: str, low: float, high: float, open_low: bool) -> None:
    """``value`` must be a finite number in ``[low, high]``, or ``(low, high]`` if ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: {name} must be {words}, got {type(value).__name__}")
    if not math.isfinite(value) or value < low or value > high or (open_low and value == low):
        raise ValueError(f"{operator}: {name} must be {words}, got {value}")


def temperature_range(operator: str, value: object, or_zero: bool = False) -> None:
    """``value`` must be a number that float32 can divide logits by. ``or_zero`` also allows 0, for greedy sampling."""
    words = f"{'0 or ' if or_zero else ''}a number in [1e-12, 1e12]"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{operator}: temperature must be {words}, got {type(value).__name__}")
    if not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE and not (or_zero and value == 0):  # NaN is refused too
        raise ValueError(f"{operator}: temperature must be {words}, got {value:g}")


def language_model_head(operator: str, hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float) -> None:
    """The operands of a fused head: ``hidden`` ``[N, H]``, ``weight`` ``[V, H]``, ``tokens`` ``[N]``, temperature."""
    float_tensor(operator, "hidden", hidden)
    float_tensor(operator, "weight", weight)
    int64_tensor(operator, "tokens", tokens)
    dimensions(operator, "hidden", hidden, "[N, H]", 2)
    dimensions(operator, "weight", weight, "[V, H]", 2)
    if weight.shape[0] == 0 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{operator}: weight must have shape [V, {hidden.shape[1]}] with V > 0, got shape {list(weight.shape)}"
        )
    same_shape(operator, "tokens", tokens, hidden.shape[:1], "hidden without its last dimension")
    for name, tensor in (("weight", weight), ("tokens", tokens)):
        same_device(operator, name, tensor, hidden.device, "hidden")
    if not torch.is_autocast_enabled(hidden.device.type):  # autocast makes them the same
        same_dtype(operator, "weight", weight, hidden.dtype, "hidden")
    temperature_range(operator, temperature)


def token_range(operator: str, tokens: Tensor, vocabulary: int) -> None:
    """Every token must be in ``[0, vocabulary)``. Only the reference needs this; native operators check it themselves.

    It is not checked on an accelerator, where reading the answer would stall the queue and gather has its own
    assertion, nor while compiling, where there are no values.
    """
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or tokens.numel() == 0:
        return
    low, high = (int(x) for x in tokens.aminmax())
    if low < 0 or high >= vocabulary:
        got = low if low < 0 else high
        raise ValueError(f"{operator}: tokens must be in [0, {vocabulary}), got {got}")


def first_order(operator: str) -> None:
    """For a backward pass: refuses to be differentiated again, because the result would silently be 0."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{operator}: gradients are first order, reverse mode only, this one was asked for with create_graph=True"
        )


def reverse_mode(operator: str, *operands: Tensor) -> None:
    """For a native forward pass: refuses operands with a tangent, because the outputs' tangents would silently be 0.

    A tangent that enters a function made by torch.compile is not noticed, since the compiler hides it.
    """
    if forward_ad._current_level >= 0 and any(map(_has_tangent, operands)):
        raise NotImplementedError(
            f"{operator}: gradients are first order, reverse mode only, this one was asked for with a tangent, as "
            "torch.func.jvp and torch.autograd.forward_ad give"
        )


def _has_tangent(x: Tensor) -> bool:
    functorch = torch._C._functorch
    while True:  # each transform of torch.func wraps the tensor once more, and any of them may be the jvp
        # The compiler cannot trace questions about wrappers. If it traces a jvp, the jvp is the outermost transform.
        compiling = torch.compiler.is_compiling()
        if (compiling or not functorch.is_batchedtensor(x)) and forward_ad.unpack_dual(x).tangent is not None:
            return True
        if compiling or not functorch.is_functorch_wrapped_tensor(x):
            return False
        x = functorch.get_unwrapped(x)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is, else float32: the dtype of the arithmetic and of the outputs."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
