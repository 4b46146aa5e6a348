"""Low-rank adapters: the loaded weights stay as they are, and two small matrices beside each linear layer learn.

LoRA (Hu et al. 2021, equation 3): ``W x`` becomes ``W x + alpha / r * B (A x)``, where A ``[r, in]`` is drawn, B
``[out, r]`` starts at zero and W is frozen. The layers are peft's (the ``lora`` extra), put into the trunk: the head
stays one plain linear layer, as the fused operators need it. With the adapter switched off the model is the one that
was loaded, bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import InputError

_NAME = "default"  # peft's name for a model's first adapter
_BASE, _DOWN, _UP = ".base_layer", f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str] | None = None, seed: int = 0
) -> None:
    """Freeze the model and put an adapter beside its trunk's linear layers, in place.

    Args:
        model: on the CPU.
        rank: r.
        alpha: scales the adapter's output by alpha / r.
        targets: endings of the names of the layers to adapt, as ``q_proj``; None: all linear layers of the trunk.
        seed: of A's draw, the same for every process.

    Raises:
        InputError: peft is not installed, or ``targets`` name no layer, or one that is not linear.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("model.lora_rank: LoRA needs peft; run: pip install 'rlhf-lightning[lora]'") from None
    names = "all-linear" if targets is None else list(targets)
    config = LoraConfig(r=int(rank), lora_alpha=float(alpha), target_modules=names)  # type: ignore[arg-type]
    trunk = model.base_model
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sees by itself that GPT-2's weights are transposed, and says so
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, trunk)
        except ValueError as error:
            raise InputError(f"model.lora_targets: {' '.join(str(error).split())[:300]}") from error
    for name, layer in adapted_layers(trunk).items():
        if layer.weight.ndim != 2 or isinstance(layer.base_layer, nn.Embedding):
            raise InputError(f"model.lora_targets: {name} is {type(layer.base_layer).__name__}; name linear layers")


def base_fingerprint(model: PreTrainedModel) -> str:
    """Tells one set of loaded weights from another: of names, shapes and 64 numbers of each, spread evenly.

    An adapter is worth nothing beside other weights, and training changes all of them. A head that is trained with the
    adapter (``score``) is left out.

    Args:
        model: whole, on the CPU, and before `add_adapter`.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if not name.startswith("score."):
            last, device = parameter.numel() - 1, parameter.device  # Lightning's default device is another
            places = torch.linspace(0, last, 64, dtype=torch.float64, device=device).long()
            sample = parameter.detach().flatten()[places].float()
            digest.update(f"{name} {list(parameter.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def adapted_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The layers that have an adapter, by name."""
    return {name: part for name, part in module.named_modules() if hasattr(part, "lora_A")}


@contextlib.contextmanager
def adapter_off(module: nn.Module) -> Iterator[None]:
    """The model as it was loaded, inside the block."""
    layers = adapted_layers(module).values()
    # Not by their enable_adapters: it also changes what requires gradients, and a sharded model does not follow that.
    for layer in layers:
        layer._disable_adapters = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False  # type: ignore[assignment]


def merged(tensors: Iterable[tuple[str, Tensor]], module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """``module``'s tensors with its adapter added to the weights, under the names of a model that never had one.

    Args:
        tensors: whole, on one device; the three of an adapted weight stand together, or are at hand anyway.
    """
    layers = adapted_layers(module)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for name, tensor in tensors:
        kind = next((end for end in (f"{_BASE}.weight", _DOWN, _UP) if name.endswith(end)), "")
        found = parts.get(name.removesuffix(kind))
        if found is None:
            yield name.replace(f"{_BASE}.", "."), tensor
            continue
        found[kind] = tensor
        if len(found) == 3:
            weight, down, up = (found.pop(end) for end in (f"{_BASE}.weight", _DOWN, _UP))
            layer = layers[name.removesuffix(kind)]
            change = layer.scaling[_NAME] * (up @ down)  # type: ignore[index]
            # GPT-2's layers have their weights transposed.
            yield (
                f"{name.removesuffix(kind)}.weight",
                weight + (change.T if getattr(layer, "fan_in_fan_out", False) else change),
            )
