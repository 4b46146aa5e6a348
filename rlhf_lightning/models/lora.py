"""Low-rank adapters: the loaded weights stay fixed, and two small matrices beside each linear layer are trained.

LoRA (Hu et al. 2021, equation 3): ``W x`` becomes ``W x + alpha / r * B (A x)``, where A ``[r, in]`` is drawn, B
``[out, r]`` starts at zero and W is frozen. The layers are peft's (the ``lora`` extra), put into the trunk: the head
stays one plain linear layer, as the fused operators need it. With the adapter switched off the model is the one that
was loaded, bit for bit.

A mixture's experts that are fused into one parameter ``[E, out, in]`` have an adapter each, all of rank r.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_lightning.errors import InputError
from rlhf_lightning.text import nearest

_NAME = "default"  # peft's name for a model's first adapter
_BASE, _DOWN, _UP = ".base_layer", f".lora_A.{_NAME}.weight", f".lora_B.{_NAME}.weight"


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: float, targets: Sequence[str] | None = None, seed: int = 0
) -> None:
    """Freezes the model and puts an adapter beside its trunk's linear layers, in place.

    Args:
        model: on the CPU.
        rank: r.
        alpha: scales the adapter's output by alpha / r.
        targets: endings of the names of the layers or fused experts to adapt, as ``q_proj`` or ``gate_up_proj``; None:
            all linear layers of the trunk, and all its fused experts.
        seed: of A's draw, the same for every process.

    Raises:
        InputError: peft is not installed, ``rank`` is above that of any weight, or ``targets`` name no layer, or one
            that is not linear.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InputError("model.lora.rank: LoRA needs peft; run: pip install 'rlhf-lightning[lora]'") from None
    trunk = model.base_model
    most = max(min(weight.shape[-2:]) for weight in trunk.parameters() if weight.ndim > 1)
    if rank > most:
        raise InputError(
            f"model.lora.rank: {rank:,} is above {most:,}, the highest rank of the model's weights; lower it"
        )
    experts = [name for name in fused_experts(trunk) if targets is None or _ends(name, targets)]
    layers = None if targets is None else [target for target in targets if not any(_ends(n, [target]) for n in experts)]
    known = [name for name, part in trunk.named_modules() if name and isinstance(getattr(part, "weight", None), Tensor)]
    for target in layers or ():  # peft is content where any of them names a layer
        if not any(_ends(name, [target]) for name in known):
            endings = sorted({name.rpartition(".")[2] for name in known})
            hint = f"did you mean {near}?" if (near := nearest(target, endings)) else f"there are {', '.join(endings)}"
            raise InputError(f"model.lora.targets: no layer's name ends with {target!r}; {hint}")
    config = LoraConfig(
        r=int(rank),
        lora_alpha=float(alpha),  # type: ignore[arg-type]
        target_modules="all-linear" if layers is None else layers or None,
        target_parameters=experts or None,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft sees by itself that GPT-2's weights are transposed, and says so
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, trunk)
        except ValueError as error:
            raise InputError(f"model.lora.targets: {' '.join(str(error).split())[:300]}") from error
    for name, layer in adapted_layers(trunk).items():
        if hasattr(layer, "parameter_name"):  # fused experts
            continue
        if layer.weight.ndim != 2 or isinstance(layer.base_layer, nn.Embedding):
            raise InputError(f"model.lora.targets: {name} is {type(layer.base_layer).__name__}; name linear layers")


def fused_experts(trunk: nn.Module) -> list[str]:
    """The names of parameters that are many matrices in one, ``[E, out, in]``."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [
        f"{name}.{own}"
        for name, module in trunk.named_modules()
        if not isinstance(module, convolutions)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    ]


def _ends(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def base_fingerprint(model: PreTrainedModel) -> str:
    """A hash that tells one set of loaded weights from another: of names, shapes and 64 spread numbers of each.

    An adapter only works beside the weights that it was trained with. A head that is trained with the adapter
    (``score``) is left out of the hash.

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
    weights = {_weight_name(name, layer): name for name, layer in layers.items()}
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for name, tensor in tensors:
        kind = next((end for end in (_DOWN, _UP) if name.endswith(end)), "")
        owner = name.removesuffix(kind) if kind else weights.get(name)
        if owner is None:
            yield name.replace(_BASE, ""), tensor
            continue
        found = parts[owner]
        found[kind] = tensor
        if len(found) == 3:
            weight, down, up = (found.pop(end) for end in ("", _DOWN, _UP))
            changed = weight + _change(layers[owner], down, up).to(weight.dtype)
            yield _weight_name(owner, layers[owner]).replace(_BASE, ""), changed


def _weight_name(name: str, layer: nn.Module) -> str:
    """What the weight beside an adapter is called: adapters of several parameters of a module stand in one another."""
    own = getattr(layer, "parameter_name", "weight")
    while hasattr(layer, "base_layer"):
        name, layer = f"{name}{_BASE}", layer.base_layer  # type: ignore[assignment]
    return f"{name}.{own}"


def _change(layer: Any, down: Tensor, up: Tensor) -> Tensor:
    """What the adapter adds to the weight beside it."""
    scaling = layer.scaling[_NAME]
    if getattr(layer, "num_experts", 1) == 1:  # a router is one matrix in a parameter
        change: Tensor = scaling * (up @ down)
        return change.T if getattr(layer, "fan_in_fan_out", False) else change  # GPT-2's weights are transposed
    # peft keeps the experts' A one below the other, [E r, in], and mixes their B, [out, r E].
    experts = layer.num_experts
    by_expert = down.reshape(experts, -1, down.shape[1]), up.reshape(up.shape[0], -1, experts)
    order = "eri,ore->eoi" if layer._did_swap_in_out_features else "eri,ore->eio"
    change = scaling * torch.einsum(order, *by_expert)
    return change
