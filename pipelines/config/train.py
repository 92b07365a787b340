"""The configuration of training: the gradient loop, the workers it runs on, and fine-tuning."""

from typing import Any, Literal

from pydantic import Field, field_validator

from pipelines.config.data import Section, SetName

SMALLEST_SHARE = 0.0001  # of a CPU or a GPU: Ray counts in these
MOST_ROWS = 1_000_000  # of a step


def check_gpus(gpus: float) -> float:
    """Return a number of GPUs that Ray can give: a share of one, or whole ones.

    Raises:
        ValueError: it cannot.
    """
    if 0 < gpus < SMALLEST_SHARE or (gpus > 1 and gpus != int(gpus)):
        raise ValueError(f"allowed: a share of one from {SMALLEST_SHARE:g} on, or a whole number")
    return gpus


class DeepSpeedConfig(Section):
    """How DeepSpeed partitions the model over the workers."""

    stage: Literal["auto", 0, 1, 2, 3] = Field(
        default="auto",
        description="ZeRO stage. auto: 0 on CPUs and one GPU, 2 when the model fits each GPU, "
        "else 3.",
    )
    offload_optimizer: bool = Field(
        default=False, description="Keep optimizer states in CPU memory (stages 1 to 3)."
    )
    offload_parameters: bool = Field(
        default=False, description="Keep parameters in CPU memory (stage 3)."
    )


class TrainConfig(Section):
    """The gradient loop and its workers. Evaluation starts workers with the same resources."""

    steps: int = Field(
        default=0,
        ge=0,
        description="Optimizer steps of unlearning: after the solver, or (solve.mode=off) instead"
        " of it.",
    )
    learning_rate: float = Field(
        default=1e-3, gt=0, le=10, description="Peak learning rate of AdamW."
    )
    warmup_steps: int = Field(default=5, ge=0, description="Steps of linear warm-up.")
    forget_batch_size: int = Field(
        default=8,
        ge=1,
        le=MOST_ROWS,
        description="Forget rows in one optimizer step, over all workers.",
    )
    retain_batch_size: int = Field(
        default=16,
        ge=1,
        le=MOST_ROWS,
        description="Retain and utility rows in one optimizer step, over all workers.",
    )
    accumulation: int = Field(
        default=1,
        ge=1,
        le=65536,
        description="Micro-batches a worker splits its rows of one step into.",
    )
    clip_norm: float = Field(
        default=1.0, ge=0, description="Gradient norm is clipped to this; 0 turns clipping off."
    )
    precision: Literal["fp32", "bf16"] = Field(
        default="fp32", description="Precision of the frozen model. Adapters are always fp32."
    )
    activation_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    num_workers: int | tuple[int, int] = Field(
        default=1,
        description="Ray Train workers (>= 1), or [min, max]: as many of them as the cluster has "
        "room for, more or fewer when nodes come or go.",
    )
    cpus_per_worker: float = Field(
        default=1,
        ge=SMALLEST_SHARE,
        description="CPU cores of a worker; also its number of threads.",
    )
    gpus_per_worker: float = Field(
        default=0, ge=0, description="GPUs of a worker; 0 trains on CPUs."
    )
    wait_s: float = Field(
        default=0,
        ge=0,
        le=7 * 24 * 3600,
        description="Seconds that an autoscaling cluster gets to start the nodes the workers need.",
    )
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between resume points.")
    max_failures: int = Field(
        default=3,
        ge=0,
        description="How often a run restarts from its last resume point by itself.",
    )
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @field_validator("gpus_per_worker")
    @classmethod
    def _shares_of_one_or_whole_gpus(cls, gpus: float) -> float:
        return check_gpus(gpus)

    @field_validator("num_workers", mode="before")
    @classmethod
    def _a_number_or_a_range(cls, workers: Any) -> Any:
        limits = workers if isinstance(workers, list | tuple) else [workers, workers]
        # pydantic would read true as 1, so the types are checked before it converts them.
        are_integers = all(type(limit) is int for limit in limits)
        if not are_integers or len(limits) != 2 or not 1 <= limits[0] <= limits[1]:
            raise ValueError("allowed: a number >= 1, or [min, max] with 1 <= min <= max")
        return workers

    @property
    def resources(self) -> dict[str, float]:
        """Return the resources of a worker, by Ray's names."""
        resources = {"CPU": self.cpus_per_worker}
        if self.gpus_per_worker:
            resources["GPU"] = self.gpus_per_worker
        return resources

    @property
    def min_workers(self) -> int:
        """Return the number of workers that training needs to start."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Return the number of workers that training uses at most."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class FinetuneConfig(Section):
    """`ray-unlearn finetune`: train all parameters of `model.path`.

    The result is the target model, or the retrain oracle.
    """

    sets: tuple[SetName, ...] = Field(
        default=("forget", "retain"),
        min_length=1,
        description="Sets of `data` to learn; leave out forget for the retrain oracle.",
    )
    epochs: int = Field(default=8, ge=1, description="Passes over the sets.")
    batch_size: int = Field(
        default=8, ge=1, le=MOST_ROWS, description="Rows in one optimizer step, over all workers."
    )
    learning_rate: float = Field(
        default=2e-4,
        gt=0,
        le=10,
        description="Peak learning rate of AdamW; falls linearly to a tenth.",
    )
    salient: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="SalUn (arXiv 2310.12508): beside `sets` the model learns random labels for "
        "the forget set, in the share of its weights where the forget set's loss has its largest "
        "gradient.",
    )
