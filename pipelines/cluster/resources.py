"""What the cluster holds: room for workers, their GPUs and environment, and the ZeRO stage that fits."""

import time
from collections.abc import Callable

import ray
from ray.autoscaler.sdk import request_resources

from pipelines.config.schema import ConfigError, TrainConfig, UnlearnConfig
from pipelines.storage.run_folder import weight_bytes


def check_resources(train: TrainConfig, say: Callable[[str], None]) -> None:
    """Refuse more workers than the cluster can hold; an autoscaling one is asked for nodes, and has `train.wait_s`.

    Of a range the fewest must fit; nodes are asked for the most.

    Raises:
        ConfigError: names what is asked for and what the cluster has.
    """
    here = ray.get_runtime_context().get_node_id()
    own = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    if own.get("CPU", 0) < 1:
        raise ConfigError(
            "RAY_ADDRESS: this node of the cluster has no CPU for tasks, allowed: to start on one with 1"
        )
    refusal = _lack(train)
    if refusal and train.wait_s:
        say(f"Waiting up to {train.wait_s:g} s for nodes: {refusal}")
        request_resources(bundles=[train.resources] * train.max_workers)
        deadline_s = time.monotonic() + train.wait_s
        try:
            while refusal and time.monotonic() < deadline_s:
                time.sleep(1)
                refusal = _lack(train)
        finally:
            request_resources(bundles=[])  # else the nodes would stay for ever
    if refusal:
        raise ConfigError(refusal)


def _lack(train: TrainConfig) -> str:
    """What the cluster lacks for the workers, each of which is on one node; empty where it lacks nothing."""
    if _room(train) >= train.min_workers:
        return ""
    found = (
        train.num_workers if isinstance(train.num_workers, int) else f"at least {train.min_workers}"
    )
    have = ray.cluster_resources()
    for kind, each in train.resources.items():
        needed = train.min_workers * each
        if needed > have.get(kind, 0):
            return (
                f"train.num_workers: found {found} with {each:g} {kind} each, "
                f"allowed: {needed:g} {kind} or fewer in all, this cluster has {have.get(kind, 0):g}"
            )
    worker = " and ".join(f"{n:g} {kind}" for kind, n in train.resources.items())
    return f"train.num_workers: found {found} with {worker} each, allowed: {_room(train)}, as many as the nodes hold"


def _room(train: TrainConfig) -> int:
    """How many workers the cluster's nodes hold."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(
        min(int(node.get(kind, 0) // n) for kind, n in train.resources.items()) for node in nodes
    )


def workers_now(train: TrainConfig) -> int:
    """How many of the workers the cluster's nodes have room for; never fewer than the fewest that will do."""
    return min(max(_room(train), train.min_workers), train.max_workers)


def groups_at_once(train: TrainConfig) -> int:
    """How many times all workers fit the cluster side by side; at least once."""
    return max(1, _room(train) // train.max_workers)


def zero_stage(train: TrainConfig, weights: int, gpu_bytes: int) -> int:
    """The ZeRO stage: as configured, or for `auto` the lowest that fits (0 on CPUs and one GPU; 2 when the weights take
    up to 60 % of a GPU's memory; else 3)."""
    if train.deepspeed.stage != "auto":
        return train.deepspeed.stage
    if train.gpus_per_worker == 0 or (train.max_workers == 1 and not gpu_bytes):
        return 0
    fits = weights <= 0.6 * gpu_bytes
    if not fits:
        return 3
    return 0 if train.max_workers == 1 else 2


def stage_of(cfg: UnlearnConfig) -> int:
    """The ZeRO stage of a configuration on this cluster's GPUs."""
    return zero_stage(cfg.train, weight_bytes(cfg.model.path), gpu_memory_bytes(cfg.train))


def gpu_memory_bytes(train: TrainConfig) -> int:
    """Memory of one of the cluster's GPUs; 0 when training on CPUs."""
    if train.gpus_per_worker == 0:
        return 0

    def measure() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    return ray.get(ray.remote(num_gpus=min(1, train.gpus_per_worker))(measure).remote())


def worker_environment(train: TrainConfig) -> dict[str, str]:
    """Environment of workers: as many threads as cores, and DeepSpeed on the right device."""
    threads = str(max(1, int(train.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if train.gpus_per_worker == 0:
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
