"""The cluster's capacity for workers, their GPUs and environment, and the ZeRO stage that fits."""

import time
from collections.abc import Callable

import ray
from ray.autoscaler.sdk import request_resources

from pipelines.config.schema import ConfigError, TrainConfig, UnlearnConfig
from pipelines.storage.run_folder import weight_bytes


def check_resources(train: TrainConfig, say: Callable[[str], None]) -> None:
    """Raise unless the cluster can hold `min_workers`.

    An autoscaling cluster is first asked for `max_workers` and given `train.wait_s` seconds.

    Raises:
        ConfigError: names the resources that are missing, or the driver's node has no CPU.
    """
    here = ray.get_runtime_context().get_node_id()
    resources = next(node["Resources"] for node in ray.nodes() if node["NodeID"] == here)
    # Tasks that read the user's files run on this node, with one CPU each.
    if resources.get("CPU", 0) < 1:
        raise ConfigError(
            "RAY_ADDRESS: this node of the cluster has no CPU for tasks; "
            "start the driver on a node with at least 1"
        )
    refusal = missing_resources(train)
    if refusal and train.wait_s:
        say(f"Waiting up to {train.wait_s:g} s for nodes: {refusal}")
        request_resources(bundles=[train.resources] * train.max_workers)
        deadline_s = time.monotonic() + train.wait_s
        try:
            while refusal and time.monotonic() < deadline_s:
                time.sleep(1)
                refusal = missing_resources(train)
        finally:
            request_resources(bundles=[])  # a request stands until it is replaced
    if refusal:
        raise ConfigError(refusal)


def missing_resources(train: TrainConfig) -> str:
    """Describe what the cluster lacks for `min_workers`, each on one node; empty if nothing."""
    capacity = worker_capacity(train)
    if capacity >= train.min_workers:
        return ""
    number = f"{train.num_workers}"
    if not isinstance(train.num_workers, int):
        number = f"at least {train.min_workers}"
    cluster = ray.cluster_resources()
    for kind, each in train.resources.items():
        needed = train.min_workers * each
        present = cluster.get(kind, 0)
        if needed > present:
            return (
                f"train.num_workers: found {number} with {each:g} {kind} each, "
                f"allowed: {needed:g} {kind} or fewer in all, this cluster has {present:g}"
            )
    worker = " and ".join(f"{each:g} {kind}" for kind, each in train.resources.items())
    return (
        f"train.num_workers: found {number} with {worker} each, "
        f"allowed: {capacity}, as many as the nodes hold"
    )


def worker_capacity(train: TrainConfig) -> int:
    """Return the number of workers that the cluster's nodes hold, busy or not."""
    workers = 0
    for node in ray.nodes():
        if node["Alive"]:
            present = node["Resources"]
            workers += min(
                int(present.get(kind, 0) // each) for kind, each in train.resources.items()
            )
    return workers


def workers_now(train: TrainConfig) -> int:
    """Return the number of workers to start: the capacity, within the configured range."""
    return min(max(worker_capacity(train), train.min_workers), train.max_workers)


def groups_at_once(train: TrainConfig) -> int:
    """Return how many full worker groups fit on the cluster at once, at least 1."""
    return max(1, worker_capacity(train) // train.max_workers)


def zero_stage(train: TrainConfig, weights: int, gpu_bytes: int) -> int:
    """Return the ZeRO stage: as configured or, for `auto`, the lowest that fits.

    `auto` is 0 on CPUs and on one GPU, 2 where the weights take up to 60 % of a GPU's memory, and
    else 3. `weights` and `gpu_bytes` are in bytes, and `gpu_bytes` is 0 where it is unknown.
    """
    if train.deepspeed.stage != "auto":
        return train.deepspeed.stage
    # A single worker has nobody to share the optimizer's state with.
    is_single = train.max_workers == 1
    if train.gpus_per_worker == 0 or (is_single and not gpu_bytes):
        return 0
    # The other 40 % are for activations, the solver's statistics and gradients.
    if weights > 0.6 * gpu_bytes:
        return 3
    return 0 if is_single else 2


def stage_of(cfg: UnlearnConfig) -> int:
    """Return the ZeRO stage of a configuration on this cluster's GPUs."""
    return zero_stage(cfg.train, weight_bytes(cfg.model.path), gpu_memory_bytes(cfg.train))


def gpu_memory_bytes(train: TrainConfig) -> int:
    """Return the memory of one of the cluster's GPUs; 0 when training on CPUs."""
    if train.gpus_per_worker == 0:
        return 0

    def measure() -> int:
        import torch

        return int(torch.cuda.get_device_properties(0).total_memory)

    # A task, because the driver's node may have no GPU. A worker's share of one is enough for it.
    return ray.get(ray.remote(num_gpus=min(1, train.gpus_per_worker))(measure).remote())


def worker_environment(train: TrainConfig) -> dict[str, str]:
    """Return a worker's environment variables: its threads, and DeepSpeed's device."""
    threads = str(max(1, int(train.cpus_per_worker)))
    environment = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    if train.gpus_per_worker == 0:
        # Without it DeepSpeed takes a GPU wherever it finds one.
        environment["DS_ACCELERATOR"] = "cpu"
    return environment
