"""One trial as Ray Tune runs it, in an actor that is used again: on its process's workbench, or as a run of its own.

A workbench holds the whole model in one process and shares what it can between trials. What it cannot do (pruning,
classifiers, a model that takes several workers) is done as `ray-unlearn run` does it, each trial on workers of its own.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray import tune

from pipelines.cluster.resources import groups_at_once
from pipelines.cluster.session import session
from pipelines.cluster.tasks import result_of, this_node
from pipelines.config.load import with_values
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.unlearn import score, train
from tuning.contracts import RUNGS, Measured, Shared
from tuning.prepare import quick, save_adapter, scored_sets
from tuning.record import TrialRecord
from tuning.score import score_trial

if TYPE_CHECKING:
    from tuning.workbench import Workbench

KEPT_FILES = ("adapter", "masks.safetensors")  # of a trial that was a run

_BENCHES: "list[Workbench]" = []  # this process's, once it has one


class Stages(NamedTuple):
    """A trial: how often it is scored, and what it measures then."""

    number: int
    measured: Iterator[Measured]


Begin = Callable[
    [int, Mapping[str, Any]], Stages
]  # from a trial's number and its changes to the configuration


class Trial(tune.Trainable):
    """Scores one configuration, once or at each rung. What it raises is the reason why the trial has failed."""

    def setup(
        self,
        config: dict[str, Any],
        begin: Begin | None = None,
        before: Mapping[str, float | None] | None = None,
        oracle: Mapping[str, float | None] | None = None,
    ) -> None:
        """Ray Tune's constructor; the work begins with the first step."""
        assert begin is not None
        assert before is not None
        self._begin, self._before, self._oracle = begin, before, oracle
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
            self._left, self._stages = self._begin(
                self.config["number"], json.loads(self.config["values"])
            )
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


class Way(NamedTuple):
    """How trials are done.

    `begin` takes a trial up, from its number and its changes to the configuration; `save_adapter` writes the pick's
    into a folder.
    """

    begin: Begin
    save_adapter: Callable[[TrialRecord, Path], None]
    resources: dict[str, float]  # of a trial's actor
    at_once: int
    has_rungs: bool  # trials of gradient steps are scored on the way


def on_workbenches(shared: Shared) -> Way:
    """Trials on a workbench in each of so many processes."""
    train = shared.cfg.train

    def begin(_number: int, values: Mapping[str, Any]) -> Stages:
        cfg = with_values(shared.cfg, dict(values))
        return Stages(RUNGS if cfg.train.steps else 1, _bench(shared).trial(cfg))

    def save(trial: TrialRecord, folder: Path) -> None:
        values = dict(trial.values)
        if trial.strengths:
            values["solve.strength"] = trial.strengths[-1]["strength"]  # not searched again
        save_adapter(shared, with_values(shared.cfg, values), folder / "adapter")

    return Way(begin, save, train.resources, train.max_workers, has_rungs=True)


def _bench(shared: Shared) -> "Workbench":
    """This process's workbench, made when it is first needed."""
    if not _BENCHES:
        from tuning.workbench import Workbench

        _BENCHES.append(Workbench(shared))
    return _BENCHES[0]


def as_runs(cfg: UnlearnConfig, sets: Sets) -> Way:
    """Trials as runs: as many at once as the cluster has room for groups of workers. Their adapters stay in folders of
    their own, below the search's."""
    cfg, node = quick(cfg), this_node()

    def folder_of(number: int) -> Path:
        return Path(cfg.output_dir) / "trials" / f"{number:04d}"

    for folder in Path(cfg.output_dir).glob("trials/*"):
        _clear(folder)  # what a killed search was at

    def begin(number: int, values: Mapping[str, Any]) -> Stages:
        def measure() -> Iterator[Measured]:
            own = with_values(cfg, {**values, "output_dir": str(folder_of(number))})
            # What an actor of Tune's starts is confined to that actor's resources, unless it is told where to run.
            task = ray.remote(num_cpus=0, max_retries=0)(_run).options(scheduling_strategy=node)
            yield result_of(task.remote(own, sets))

        return Stages(1, measure())

    def save(trial: TrialRecord, folder: Path) -> None:
        for name in KEPT_FILES:  # of an earlier pick
            _remove(folder / name)
        shutil.copytree(folder_of(trial.number), folder, dirs_exist_ok=True)

    # The actor only waits; but Tune takes no request for nothing, and the workers need all CPUs.
    return Way(begin, save, {"CPU": 0, "memory": 1}, groups_at_once(cfg.train), has_rungs=False)


def _run(cfg: UnlearnConfig, sets: Sets) -> Measured:
    """Unlearn as `ray-unlearn run` does and score the merged model; only the adapter and the masks are left."""
    from pipelines.model.load import (
        check_models,
    )  # late: the driver imports none of what that takes

    check_models(cfg, {})
    folder = Path(cfg.output_dir)
    run, terminal = RunFolder(cfg, "run"), Terminal()
    run.path.mkdir(parents=True)
    try:
        with session(cfg.train, folder / "run.log", terminal):
            cost = train(run, sets, None, terminal)
            after = {"after": ModelConfig(path=str(folder / "model"))}
            scores, _ = score(cfg, after, scored_sets(sets), terminal)
        return Measured(
            scores["after"], cost["solve_s"] + cost["train_s"], run.manifest()["strengths"]
        )
    finally:
        _clear(folder)


def _clear(folder: Path) -> None:
    """Leave of a trial's folder what is kept."""
    for path in folder.iterdir():
        if path.name not in KEPT_FILES:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
