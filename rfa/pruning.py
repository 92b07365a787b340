"""Prune chosen layers, and hold them pruned while LoRA repairs the model.

The method is after Mittal 2024 (PruneLoRA, arXiv 2411.11907): prune, adapt, unlearn. `rows` is the
paper's structured pruning, of the output rows of smallest L2 norm, as torch's
`ln_structured(n=2, dim=0)`. `magnitude` prunes a layer's smallest weights. `wanda` is after Sun et
al. 2023 (arXiv 2306.11695). It scores |weight| times its input's norm within each output row.

A row is one output: a row of a linear weight, a column of transformers' `Conv1D`, a filter of a
convolution. The number of pruned rows or weights is rounded, and biases stay, both as in torch. So
a pruned output is its bias. Masks are bool tensors on the CPU, True where a weight stays, by the
weight's name in the model without adapters. A mask that does not fit the model raises ValueError.

Shapes: O outputs, D inputs of one output (of a convolution: channels times kernel positions), R
groups compared within, C candidates, N positions, B images, C x H x W pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from rfa.adapters import ending
from rfa.blocks import hook_scope
from rfa.prunable import refuse_fused, refuse_shared

Method = Literal["rows", "magnitude", "wanda"]
Layer = nn.Linear | Conv1D | nn.Conv2d
# A scope in which a parameter that ZeRO-3 has partitioned can be read and written in full.
Whole = Callable[[Any], AbstractContextManager[Any]]

GROUPS: dict[str, tuple[type[nn.Module], ...]] = {
    "all": (nn.Linear, Conv1D, nn.Conv2d),
    "linear": (nn.Linear, Conv1D),
    "convolutions": (nn.Conv2d,),
}


def prune_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Return the full names of the layers that `targets` choose, in the model's order.

    A target is a name or the end of one, or a group: `all`, `linear`, `convolutions`. Groups leave
    out the head (the part of a transformers model above its base model). Its name chooses it.

    Raises:
        ValueError: a target matches nothing, a group leaves out experts, or a layer shares its
            weight with another module.
    """
    layers = _layers(model)
    chosen: set[str] = set()
    for target in targets:
        matched = _matches(model, layers, target)
        if target in ("all", "linear"):
            refuse_fused(model, target, layers)
        if not matched:
            groups = [group for group in GROUPS if _matches(model, layers, group)]
            endings = {ending(name) for name in layers}
            choices = ", ".join(groups + sorted(endings))
            raise ValueError(
                f"prune.targets: no layer ends with '{target}'; this model has: {choices}"
            )
        chosen |= matched
    names = [name for name in layers if name in chosen]
    refuse_shared(model, {name: layers[name] for name in names})
    return names


@contextmanager
def collecting_norms(
    model: nn.Module, names: Sequence[str], chosen: Callable[[], Tensor] | None = None
) -> Iterator[dict[str, Tensor]]:
    """Sum the squares of the layers' inputs over all forward passes within the scope, for `wanda`.

    Yields a tensor by layer, [D + 1] in float64 on the layer's device: the sum of squares of each
    input and, last, the number of positions. Workers' tensors add up. The inputs of a convolution
    are its channels at each position of the kernel, in the order of the flattened weight. `chosen`
    returns the mask [B, T] of the tokens that count in the current batch. It serves linear layers
    whose positions are tokens.

    Raises:
        ValueError: a layer is a grouped convolution, or its positions are not those of the mask.
    """
    norms: dict[str, Tensor] = {}

    def add(name: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input_: Tensor = args[0] if args else next(iter(kwargs.values()))
        mask = None if chosen is None else chosen()
        square_D, count = _squares(name, layer, input_.detach(), mask)
        norms[name] += torch.cat([square_D, square_D.new_tensor([count])])

    with ExitStack() as stack:
        for name, layer in _named(model, names).items():
            size, device = _width(name, layer) + 1, layer.weight.device
            norms[name] = torch.zeros(size, dtype=torch.float64, device=device)
            hook = layer.register_forward_pre_hook(partial(add, name), with_kwargs=True)
            stack.enter_context(hook_scope(hook))
        yield norms


@torch.no_grad()
def prune_(
    model: nn.Module,
    names: Sequence[str],
    method: Method,
    sparsity: float,
    norms: Mapping[str, Tensor] | None = None,
    whole: Whole = nullcontext,
) -> dict[str, Tensor]:
    """Zero the share `sparsity` of each named layer, in place, and return the masks.

    Masks are by parameter name. Equal scores are pruned in the order of their index, so that all
    workers make the same masks. `wanda` needs `norms` as `collecting_norms` yields them. `whole` is
    a scope in which a parameter can be read and written in full.

    Raises:
        ValueError: the method or the sparsity is not allowed, weights are quantised, or `wanda` has
            a grouped convolution or no inputs. Then nothing has been changed.
    """
    if method not in get_args(Method):
        raise ValueError(f"prune.method: found '{method}', allowed: {', '.join(get_args(Method))}")
    if not 0 < sparsity < 1:
        raise ValueError(f"prune.sparsity: found {sparsity}, allowed: above 0 and below 1")
    layers = _named(model, names)
    for name, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ValueError(
                f"prune.targets: '{name}' is quantised ({layer.weight.dtype}), "
                "allowed: float weights"
            )
        if method == "wanda":
            _width(name, layer)  # raises for grouped convolutions
            if norms is None or name not in norms or not norms[name][-1]:
                raise ValueError(
                    f"prune.method: 'wanda' needs inputs, none reached '{name}'; "
                    "allowed: rows, magnitude"
                )
    masks: dict[str, Tensor] = {}
    for name, layer in layers.items():
        with whole(layer.weight):
            # Norms in half precision would be rounded to many ties.
            full = torch.promote_types(layer.weight.dtype, torch.float32)
            weight_OD = _as_rows(layer.weight.detach(), layer).to(full)
            norm_D: Tensor | float = 1.0
            if norms is not None and method == "wanda":
                norm_D = norms[name][:-1].sqrt().to(weight_OD)
            keep_OD = _unpruned(weight_OD, method, sparsity, norm_D)
            if isinstance(layer, Conv1D):
                keep_OD = keep_OD.T
            keep = keep_OD.reshape(layer.weight.shape)
            layer.weight.masked_fill_(~keep, 0)
        masks[f"{name}.weight"] = keep.cpu().contiguous()
    return masks


@torch.no_grad()
def apply_masks_(model: nn.Module, masks: Mapping[str, Tensor], whole: Whole = nullcontext) -> None:
    """Zero the pruned weights again, in place, in a merged model or below its adapters."""
    for name, layer in _named(model, masks).items():
        mask = masks[name]
        with whole(layer.weight):
            if layer.weight.shape != mask.shape:
                raise ValueError(
                    f"masks: '{name}' has {list(mask.shape)}, this model {list(layer.weight.shape)}"
                )
            layer.weight.masked_fill_(~mask.to(layer.weight.device), 0)


def hold_rows_(
    peft_model: nn.Module, masks: Mapping[str, Tensor], whole: Whole = nullcontext
) -> list[RemovableHandle]:
    """Hold the pruned rows of every adapted layer's B at zero, so that merging leaves them zero.

    The rows are zeroed now and get no gradient from now on. Call it before the optimizer exists, as
    DeepSpeed's optimizer copies the parameters. Layers with a mask that cuts through rows are left
    out, and need `apply_masks_` after merging. Returns the hooks on the gradients.
    """
    # Without a gradient Adam's moments stay zero, and weight decay leaves a zero where it is.
    adapted = {id(m.base_layer): m for m in peft_model.modules() if isinstance(m, LoraLayer)}
    handles: list[RemovableHandle] = []
    for name, layer in _named(peft_model, masks).items():
        keep_O = kept_rows(masks[name], layer)
        if id(layer) not in adapted or keep_O is None or keep_O.all():
            continue
        for b in adapted[id(layer)].lora_B.values():
            weight: Any = b.weight  # [O, K], or [O, K, 1, 1] of a convolution
            pruned_O = ~keep_O.to(weight.device)
            with torch.no_grad(), whole(weight):
                weight[pruned_O] = 0
            handles.append(weight.register_hook(partial(_without_rows, pruned_O)))
    return handles


def kept_rows(mask: Tensor, module: nn.Module) -> Tensor | None:
    """Return the outputs [O] that the mask of `module` leaves, or None if it cuts through a row."""
    layer = module.base_layer if isinstance(module, LoraLayer) else module
    keep_OD = _as_rows(mask, layer)
    keep_O = keep_OD.any(dim=1)
    return keep_O if torch.equal(keep_O, keep_OD.all(dim=1)) else None


@torch.no_grad()
def sparsity(model: nn.Module, masks: Mapping[str, Tensor], whole: Whole = nullcontext) -> float:
    """Return the share of exact zeros among all weights of the masked layers."""
    zeros = 0
    for layer in _named(model, masks).values():
        with whole(layer.weight):
            zeros += int((layer.weight == 0).sum())
    return zeros / sum(mask.numel() for mask in masks.values())


def _layers(model: nn.Module) -> dict[str, Layer]:
    """Return all layers that can be pruned, by their names in the model without adapters."""
    root: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    layers: dict[str, Layer] = {}
    adapted: tuple[str, ...] = ()
    for name, module in root.named_modules():
        if isinstance(module, LoraLayer):
            # Its children are the base layer, which is taken here, and the adapter's layers.
            adapted += (f"{name}.",)
            module = module.base_layer
        elif name.startswith(adapted):
            continue
        if isinstance(module, GROUPS["all"]):
            layers[name] = module  # pyright: ignore[reportArgumentType]  # the tuple is Layer's
    return layers


def _named(model: nn.Module, names: Iterable[str]) -> dict[str, Layer]:
    """Return layers by their names or by their weights' names, after checking all of the names."""
    layers = _layers(model)
    named: dict[str, Layer] = {}
    for name in names:
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            endings = {ending(other) for other in layers}
            choices = ", ".join(sorted(endings))
            raise ValueError(
                f"masks: no layer for '{name}' in this model, whose layers end with: {choices}"
            )
        named[name] = layer
    return named


def _matches(model: nn.Module, layers: Mapping[str, Layer], target: str) -> set[str]:
    """Return the names that a target matches: a group, a name or the end of one."""
    if target not in GROUPS:
        return {name for name in layers if f".{name}".endswith(f".{target}")}
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base = getattr(root, "base_model_prefix", "")
    inside = f"{base}." if base and hasattr(root, base) else ""
    head = root.get_output_embeddings() if hasattr(root, "get_output_embeddings") else None
    names: set[str] = set()
    for name, layer in layers.items():
        if isinstance(layer, GROUPS[target]) and layer is not head and name.startswith(inside):
            names.add(name)
    return names


def _width(name: str, layer: Layer) -> int:
    """Return D of a layer."""
    # It is read off the layer's settings, as a weight that ZeRO-3 has partitioned has no shape.
    if not isinstance(layer, nn.Conv2d):
        return layer.nx if isinstance(layer, Conv1D) else layer.in_features
    if layer.groups > 1:
        raise ValueError(
            f"prune.method: found 'wanda', '{name}' has {layer.groups} groups; "
            "allowed: rows, magnitude"
        )
    return layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1]


def _squares(name: str, layer: Layer, input_: Tensor, chosen: Tensor | None) -> tuple[Tensor, int]:
    """Return each input's sum of squares over positions, [D] in float64, and their number."""
    if not isinstance(layer, nn.Conv2d):
        input_ND = input_.reshape(-1, input_.shape[-1])
        # The input of a layer after pooling has one position a row, and no tokens to choose.
        if chosen is not None and len(input_ND) != len(chosen):
            if chosen.numel() != len(input_ND):
                raise ValueError(
                    f"prune.targets: '{name}' sees {len(input_ND)} positions "
                    f"of {chosen.numel()} tokens"
                )
            input_ND = input_ND[chosen.reshape(-1).to(input_ND.device)]
        return input_ND.float().square().sum(dim=0, dtype=torch.float64), len(input_ND)
    assert chosen is None, f"{name}: tokens are chosen for linear layers alone"
    # Padding and unfolding only copy. So the squares are summed over the images first, and only one
    # image is unfolded.
    square_BCHW = input_.reshape(-1, *input_.shape[-3:]).float().square()
    square_CHW = square_BCHW.sum(dim=0, dtype=torch.float64)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded_CHW = F.pad(square_CHW[None], layer._reversed_padding_repeated_twice, mode=mode)
    unfolded_DN = F.unfold(
        padded_CHW, layer.kernel_size, dilation=layer.dilation, stride=layer.stride
    )[0]  # pyright: ignore[reportArgumentType]
    return unfolded_DN.sum(dim=1), len(square_BCHW) * unfolded_DN.shape[1]


def _as_rows(weight: Tensor, layer: nn.Module) -> Tensor:
    """Reshape a weight, or its mask, to [O, D]."""
    return weight.T if isinstance(layer, Conv1D) else weight.flatten(1)


def _unpruned(weight_OD: Tensor, method: Method, sparsity: float, norm_D: Tensor | float) -> Tensor:
    """Return the mask of one layer, [O, D], True where a weight stays."""
    if method == "rows":
        pruned_1O = _smallest(torch.linalg.vector_norm(weight_OD, dim=1)[None], sparsity)
        return ~pruned_1O.T.expand_as(weight_OD)
    if method == "magnitude":
        return ~_smallest(weight_OD.abs().reshape(1, -1), sparsity).reshape(weight_OD.shape)
    return ~_smallest(weight_OD.abs() * norm_D, sparsity)


def _smallest(score_RC: Tensor, share: float) -> Tensor:
    """Mark the `round(share * C)` smallest scores in each row. Ties go to the lower index."""
    count = round(share * score_RC.shape[1])
    if count == 0:
        return torch.zeros_like(score_RC, dtype=torch.bool)
    # Sorting 30 million scores took 3.9 s on two CPU cores, and this threshold 0.5 s.
    threshold_R1 = score_RC.kthvalue(count, dim=1, keepdim=True).values
    below_RC = score_RC < threshold_R1
    equal_RC = score_RC == threshold_R1
    missing_R1 = count - below_RC.sum(dim=1, keepdim=True)
    return below_RC | (equal_RC & (equal_RC.cumsum(dim=1) <= missing_R1))


def _without_rows(pruned_O: Tensor, grad: Tensor) -> Tensor:
    pruned = pruned_O.to(grad.device).view(-1, *[1] * (grad.dim() - 1))
    # A product would not do: 0 times an overflowed gradient is NaN.
    return grad.masked_fill(pruned, 0)
