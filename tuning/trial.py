"""One trial as Ray Tune runs it: in an actor that is used again, on the workbench of its process."""

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ray import tune

from pipelines.config_file import with_values
from tuning.prepare import Shared
from tuning.score import score_trial

if TYPE_CHECKING:
    from tuning.bench import Measured, Workbench

RUNGS = 4  # how often a trial of gradient steps is scored: where a scheduler can stop it

_BENCHES: "list[Workbench]" = []  # this process's, once it has one


class Trial(tune.Trainable):
    """Scores one configuration, once or at each rung. What it raises is the reason why the trial has failed."""

    def setup(
        self,
        config: dict[str, Any],
        shared: Shared | None = None,
        before: Mapping[str, float | None] | None = None,
        oracle: Mapping[str, float | None] | None = None,
    ) -> None:
        """Ray Tune's constructor; the work begins with the first step."""
        assert shared is not None
        assert before is not None
        self._shared, self._before, self._oracle = shared, before, oracle
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial."""
        self.config = new_config
        self._stages: Iterator[Measured] | None = None
        self._left = 1
        return True

    def step(self) -> dict[str, Any]:
        """Work up to the next rung, and the values there."""
        if self._stages is None:
            if not _BENCHES:
                from tuning.bench import Workbench

                _BENCHES.append(Workbench(self._shared))
            cfg = with_values(self._shared.cfg, json.loads(self.config["values"]))
            self._left = RUNGS if cfg.train.steps else 1
            self._stages = _BENCHES[0].trial(cfg)
        measured = next(self._stages)
        self._left -= 1
        score = score_trial(measured.scores, self._before, self._oracle, measured.cost_s)
        if not self._left:
            self.cleanup()
        return {
            **score._asdict(),
            "scores": measured.scores,
            "strengths": measured.strengths,
            "whole": not self._left,
            "done": not self._left,
        }

    def cleanup(self) -> None:
        """Take the trial's adapter off the model."""
        if self._stages is not None:
            self._stages.close()  # pyright: ignore[reportAttributeAccessIssue]
            self._stages = None
