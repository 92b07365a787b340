"""The work that Ray Train sends to each worker.

This module imports little: Ray's own actors (controller, data manager) unpickle it too, and need
none of torch's weight.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config.schema import UnlearnConfig

Kind = Literal["unlearn", "finetune", "prepare"]


@dataclass(frozen=True)
class Job:
    """A worker's task in plain values, without a model.

    `batches` gives the number of batches of each stream, and `stage` the ZeRO stage. The learning
    rate falls to the share `final_rate` of its peak. `messages` is a Ray queue to the driver,
    and `prepared` a checkpoint of Ray Train's with the statistics of `ray-unlearn prepare`, if any.
    """

    cfg: UnlearnConfig
    kind: Kind
    steps: int
    learning_rate: float
    final_rate: float
    batches: dict[str, int]
    stage: int
    messages: Any
    prepared: Any = None

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        return learning_rate_at(
            step,
            steps=self.steps,
            peak=self.learning_rate,
            warmup_steps=self.cfg.train.warmup_steps,
            final_share=self.final_rate,
        )


def learning_rate_at(
    step: int, *, steps: int, peak: float, warmup_steps: int, final_share: float = 0.0
) -> float:
    """Rise linearly to `peak` over the warm-up, then fall linearly to `final_share` of it."""
    warmup = min(warmup_steps, steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    share = (step - warmup) / max(steps - warmup, 1)
    return peak * (1 - (1 - final_share) * share)
