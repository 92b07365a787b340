"""The numbers of a plan: how a worker does its work, the memory that takes, and the run's time.

Nothing here imports torch, because the driver receives a plan from the task that computed it.
"""

import json
from typing import NamedTuple

from pipelines.config.schema import UnlearnConfig
from pipelines.planning.devices import Device

# A plan assumes this many rows of a set whose number is unknown before the data has been read.
ASSUMED_ROWS = 1000
# The share of a device's peak rate that a run is assumed to reach. It has not been measured.
ASSUMED_UTILISATION = 0.3

RowCounts = dict[str, int | None]


class Parts(NamedTuple):
    """Peak memory of a worker's device in bytes, by purpose.

    `total` is less than the sum: the solver frees its statistics before training begins, so
    `statistics` and `optimizer` never exist together.
    """

    weights: int
    adapters: int
    optimizer: int
    activations: int
    statistics: int
    total: int


class Layout(NamedTuple):
    """The settings that trade a worker's memory against its speed."""

    stage: int
    checkpointing: bool
    accumulation: int
    offload_parameters: bool

    @classmethod
    def of(cls, cfg: UnlearnConfig, stage: int) -> "Layout":
        """Return the configured layout, in a given ZeRO stage."""
        train = cfg.train
        return cls(
            stage,
            train.activation_checkpointing,
            train.accumulation,
            train.deepspeed.offload_parameters,
        )

    def changes_from(self, configured: "Layout") -> list[str]:
        """Return the command-line overrides that turn the configured layout into this one."""
        keys = (
            "deepspeed.stage",
            "activation_checkpointing",
            "accumulation",
            "deepspeed.offload_parameters",
        )
        changes: list[str] = []
        for key, value, present in zip(keys, self, configured, strict=True):
            if value != present:
                changes.append(f"train.{key}={json.dumps(value)}")
        return changes


class Plan(NamedTuple):
    """A run's needs on a kind of device.

    `stages` lists the memory of ZeRO stages 0 to 3. `recommended` is the fastest layout that fits,
    None where none does. `seconds` covers the solver's passes and the steps at
    `operations_per_s`, the device's peak rate. `cost` is in the currency of `price`, which is for
    one of `gpus` and hour. `fault` says why activations and time come from a formula.
    """

    device: Device
    configured: Layout
    stages: list[Parts]
    scoring_bytes: float
    recommended: Layout | None
    operations_per_s: float
    seconds: float
    assumes_rows: bool
    gpus: float
    price: float | None
    fault: str | None

    @property
    def cost(self) -> float:
        """Return the price of all GPUs for the planned time; 0 without a price."""
        return (self.price or 0.0) * self.gpus * self.seconds / 3600
