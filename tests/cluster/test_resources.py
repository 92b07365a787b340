"""What a run finds when the cluster's nodes come late, in a real cluster of two nodes of its own."""

import json
import os
import subprocess
import sys

SCRIPT = """
import json, threading, time
import ray
from ray.cluster_utils import Cluster
from pipelines.config.schema import ConfigError, TrainConfig
from pipelines.cluster.resources import check_resources, groups_at_once, workers_now

told = []
def outcome(**settings):
    try:
        check_resources(TrainConfig(**{"num_workers": 3, **settings}), told.append)
        return "enough"
    except ConfigError as error:
        return str(error)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
ray.init(cluster.address)
found = [outcome(), outcome(wait_s=1), outcome(num_workers=(1, 3)), outcome(num_workers=(2, 3))]
waiting = threading.Thread(target=lambda: found.append(outcome(wait_s=60)))
waiting.start()
time.sleep(2)
cluster.add_node(num_cpus=2, num_gpus=0)
waiting.join()
found.append(outcome(num_workers=1, cpus_per_worker=3))
room = [workers_now(TrainConfig(num_workers=workers)) for workers in ((1, 9), (1, 2), 9)]
room.append(workers_now(TrainConfig(num_workers=(1, 9), cpus_per_worker=2)))
groups = [groups_at_once(TrainConfig(num_workers=workers)) for workers in (1, 2, (1, 3), 9)]
ray.shutdown()
cluster.shutdown()
print(json.dumps({"found": found, "told": told, "room": room, "groups": groups}))
"""


def test_workers_wait_for_the_nodes_of_an_autoscaling_cluster_as_long_as_they_may() -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    refusal = "train.num_workers: found 3 with 1 CPU each, allowed: 3 CPU or fewer in all, this cluster has 1"
    fewest = refusal.replace("found 3", "found at least 2").replace("allowed: 3", "allowed: 2")
    apart = "train.num_workers: found 1 with 3 CPU each, allowed: 0, as many as the nodes hold"
    assert seen["found"] == [refusal, refusal, "enough", fewest, "enough", apart]
    assert seen["told"] == [f"Waiting up to {wait_s} s for nodes: {refusal}" for wait_s in (1, 60)]
    assert seen["room"] == [3, 2, 9, 1], (
        "as many of a range as the nodes have room for, each on one node"
    )
    assert seen["groups"] == [3, 1, 1, 1]
