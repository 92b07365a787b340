"""What a Ray Train worker is sent, and the function it runs.

Light on imports: Ray's own actors (controller, data manager) unpickle this module too and need none of torch's weight.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pipelines.config.schema import UnlearnConfig


@dataclass(frozen=True)
class Job:
    """What a worker is sent: plain values, never a model.

    `batches` gives the number of batches of the streams `retain` and `forget`; `stage` is the ZeRO stage; the learning
    rate falls to the share `final_rate`; `messages` is a Ray queue to the driver.
    """

    cfg: UnlearnConfig
    kind: Literal["unlearn", "finetune"]
    steps: int
    learning_rate: float
    final_rate: float
    batches: dict[str, int]
    stage: int
    messages: Any

    def rate(self, step: int) -> float:
        """Linear warm-up to `learning_rate`, then linear to the share `final_rate` of it."""
        warmup = min(self.cfg.train.warmup_steps, self.steps)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        share = (step - warmup) / max(self.steps - warmup, 1)
        return self.learning_rate * (1 - (1 - self.final_rate) * share)
