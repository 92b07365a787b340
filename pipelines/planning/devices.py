"""Devices that a worker computes on: GPUs by name, and those of the cluster that is joined."""

from typing import NamedTuple

import ray

from pipelines.cluster.resources import gpu_memory_bytes
from pipelines.config.schema import ConfigError, TrainConfig

GIB = 2**30
# Ray's names of GPUs to memory in GiB and dense bf16 operations a second of the tensor cores, both
# from NVIDIA's data sheets.
GPUS = {
    "A10G": (24, 70e12),
    "L4": (24, 121e12),
    "L40S": (48, 362e12),
    "A100-40G": (40, 312e12),
    "A100": (80, 312e12),
    "H100": (80, 989e12),
    "H200": (141, 989e12),
}
# The share of a device's memory to plan with: allocators lose the rest between the blocks.
USABLE_SHARE = 0.9
# Memory that no tensor accounts for: CUDA's and NCCL's buffers, or a process with torch and Ray.
RUNTIME_BYTES = {"GPU": 2 * GIB, "CPU": GIB}


class Device(NamedTuple):
    """A worker's device; `kind` is GPU or CPU, `operations_per_s` is 0 where it is unknown."""

    name: str
    kind: str
    memory_bytes: int
    operations_per_s: float

    @property
    def budget(self) -> int:
        """Return the bytes that tensors may take."""
        return int(self.memory_bytes * USABLE_SHARE) - RUNTIME_BYTES[self.kind]


def planned_device(train: TrainConfig, gpu: str) -> Device:
    """Return a GPU by its name in `GPUS`, before there is a cluster.

    Raises:
        ConfigError: the name is unknown, or the configuration gives workers no GPU.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu: found '{gpu}', allowed: {', '.join(GPUS)}")
    if train.gpus_per_worker == 0:
        raise ConfigError(
            "train.gpus_per_worker: found 0 with --gpu, allowed: 1, the GPUs of a worker"
        )
    memory_gib, operations_per_s = GPUS[gpu]
    return Device(gpu, "GPU", memory_gib * GIB, operations_per_s)


def present_device(train: TrainConfig) -> Device:
    """Return a worker's device on the cluster that is joined: the slowest where they differ."""
    resources = ray.cluster_resources()
    if train.gpus_per_worker == 0:
        # Workers share the memory of a node. Their rate is measured where the plan is made.
        return Device("CPU", "CPU", int(resources.get("memory", 0) / train.max_workers), 0.0)
    # Ray lists the kinds of GPU as resources, such as `accelerator_type:H100`.
    names: list[str] = []
    rates: list[float] = []
    for resource in resources:
        prefix, _, name = resource.partition("accelerator_type:")
        if name and not prefix:
            names.append(name)
            if name in GPUS:
                rates.append(GPUS[name][1])
    memory_bytes = gpu_memory_bytes(train)
    return Device(", ".join(names) or "GPU", "GPU", memory_bytes, min(rates, default=0.0))
