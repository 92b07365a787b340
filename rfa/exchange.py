"""Exchange values between workers.

Every function also works without torch.distributed, as on one worker.
"""

from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rfa.moments import InputMoments
from rfa.targets import FeatureSums

Value = TypeVar("Value")


def world_size() -> int:
    """Return the number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this worker's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_on(owner: int, moments: InputMoments) -> None:
    """Add up all workers' moments on `owner`. The others' are undefined afterwards."""
    if not dist.is_initialized():
        return
    dist.reduce(moments.sum_DL, owner)
    device = moments.sum_DL.device
    # In float64: float32 counts tokens exactly to 16.8 million only.
    totals = torch.tensor([moments.count, moments.trace], dtype=torch.float64, device=device)
    dist.reduce(totals, owner)
    moments.count, moments.trace = float(totals[0]), float(totals[1])


def gather_on(owner: int, value: Value) -> list[Value]:
    """Gather every worker's value on `owner`. The other workers get an empty list."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = None
    if dist.get_rank() == owner:
        values = [None] * dist.get_world_size()
    dist.gather_object(value, values, dst=owner)
    return values or []


def gather_all(value: Value) -> list[Value]:
    """Gather every worker's value on every worker."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_from(owner: int, value: Value) -> Value:
    """Return the owner's value on every worker."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=owner)
    return values[0]


def merged_features(sums: dict[str, FeatureSums]) -> dict[str, FeatureSums]:
    """All-reduce: return the total over workers, on every worker."""
    merged = {name: FeatureSums() for name in sums}
    # Added in the order of ranks, so that every worker gets the same bits and fits the same targets.
    for part in gather_all(sums):
        for name, total in merged.items():
            total.merge(part[name])
    return merged
