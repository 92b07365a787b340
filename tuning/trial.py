"""The two kinds of trial that Ray Tune runs: on a model that trials share, or as separate runs.

A workbench holds an unpartitioned model in one process and shares its statistics between trials.
Pruning, classifiers and a model that takes several workers do not fit one. Their trials do the same
as `ray-unlearn run`, each on workers of its own.
"""

import functools
import json
import shutil
from collections.abc import Callable, Generator
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
from pipelines.preflight import check_partitioning
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.unlearn import score, train
from tuning.contracts import Measured, Shared
from tuning.prepare import likelihoods_only, save_adapter, scored_sets
from tuning.record import TrialRecord
from tuning.score import References, score_trial

if TYPE_CHECKING:
    from tuning.workbench import Workbench

# The files of a trial's run that stay after it.
KEPT_FILES = ("adapter", "masks.safetensors")


class SharedModelTrial(tune.Trainable):
    """A trial on its process's workbench, scored at every rung.

    Tune uses the process again for the next trial, so the model is loaded once.
    """

    def setup(
        self,
        config: dict[str, Any],
        shared: Shared | None = None,
        references: References | None = None,
    ) -> None:
        """Take the first trial."""
        assert shared is not None
        assert references is not None
        self._shared = shared
        self._references = references
        self.reset_config(config)

    @functools.cached_property
    def _workbench(self) -> "Workbench":
        # Made with the first step, where Tune reports an error as the trial's reason to fail.
        from tuning.workbench import Workbench

        return Workbench(self._shared)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial, and return True, which allows Tune to use the process again."""
        self.config = new_config
        self._rungs: Generator[tuple[Measured, bool]] | None = None
        return True

    def step(self) -> dict[str, Any]:
        """Work up to the next rung, and report the scores there."""
        if self._rungs is None:
            cfg = with_values(self._shared.cfg, json.loads(self.config["values"]))
            self._rungs = self._workbench.trial(cfg)
        measured, is_last = next(self._rungs)
        report = _report(measured, self._references, is_last=is_last)
        if is_last:
            self.cleanup()
        return report

    def cleanup(self) -> None:
        """Take the trial's adapter off the model, also when the scheduler stops it on the way."""
        if self._rungs is not None:
            self._rungs.close()
            self._rungs = None


class RunTrial(tune.Trainable):
    """A trial that is a separate run, scored at its end."""

    def setup(
        self,
        config: dict[str, Any],
        run_trial: Callable[[int, dict[str, Any]], Measured] | None = None,
        references: References | None = None,
    ) -> None:
        """Take the first trial."""
        assert run_trial is not None
        assert references is not None
        self._run_trial = run_trial
        self._references = references
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next trial, and return True, which allows Tune to use the process again."""
        self.config = new_config
        return True

    def step(self) -> dict[str, Any]:
        """Do the run, and report its scores."""
        values = json.loads(self.config["values"])
        measured = self._run_trial(self.config["number"], values)
        return _report(measured, self._references, is_last=True)


def _report(measured: Measured, references: References, *, is_last: bool) -> dict[str, Any]:
    """Return the result of a step for Tune. `done` ends the trial."""
    score = score_trial(
        measured.scores, references["before"], references.get("oracle"), measured.cost_s
    )
    return {
        **score._asdict(),
        "scores": measured.scores,
        "strengths": measured.strengths,
        "is_last": is_last,
        "done": is_last,
    }


class TrialBackend(NamedTuple):
    """One way to do trials.

    `trainable` is a Trainable with its arguments and resources. `save_adapter` writes the adapter
    of the pick into a folder. `has_rungs` says whether gradient trials are scored on the way.
    """

    trainable: Any
    save_adapter: Callable[[TrialRecord, Path], None]
    concurrent_trials: int
    has_rungs: bool


def shared_model(shared: Shared, references: References) -> TrialBackend:
    """Run trials on workbenches, one in each of `train.num_workers` processes."""
    train = shared.cfg.train

    def save(trial: TrialRecord, folder: Path) -> None:
        values = dict(trial.values)
        # The strength that the trial chose is not searched for again.
        if trial.strengths:
            values["solve.strength"] = trial.strengths[-1]["strength"]
        save_adapter(shared, with_values(shared.cfg, values), folder / "adapter")

    trainable = tune.with_parameters(SharedModelTrial, shared=shared, references=references)
    with_resources = tune.with_resources(trainable, train.resources)
    return TrialBackend(with_resources, save, train.max_workers, has_rungs=True)


def run_per_trial(cfg: UnlearnConfig, sets: Sets, references: References) -> TrialBackend:
    """Run each trial separately, as many at once as the cluster holds groups of workers.

    The trials' adapters stay in numbered folders below the search's folder.
    """
    cfg = likelihoods_only(cfg)
    node = this_node()
    # A trial that was running when a search was killed has left its files.
    for folder in Path(cfg.output_dir).glob("trials/*"):
        _clear(folder)

    def folder_of(number: int) -> Path:
        return Path(cfg.output_dir) / "trials" / f"{number:04d}"

    def run_trial(number: int, values: dict[str, Any]) -> Measured:
        trial_cfg = with_values(cfg, {**values, "output_dir": str(folder_of(number))})
        # Ray confines the tasks of Tune's actor to the actor's resources, unless a task names its
        # node. A retry would find the folder of the first attempt, so there is none.
        task = ray.remote(num_cpus=0, max_retries=0)(_run).options(scheduling_strategy=node)
        return result_of(task.remote(trial_cfg, sets))

    def save(trial: TrialRecord, folder: Path) -> None:
        # An earlier pick may have left files that this one does not have.
        for name in KEPT_FILES:
            _remove(folder / name)
        shutil.copytree(folder_of(trial.number), folder, dirs_exist_ok=True)

    trainable = tune.with_parameters(RunTrial, run_trial=run_trial, references=references)
    # The actor only waits, and the workers need all CPUs. Tune refuses an empty request, so it asks
    # for one byte of memory.
    with_resources = tune.with_resources(trainable, {"CPU": 0, "memory": 1})
    return TrialBackend(with_resources, save, groups_at_once(cfg.train), has_rungs=False)


def _run(cfg: UnlearnConfig, sets: Sets) -> Measured:
    """Unlearn as `ray-unlearn run` does and score the model. Leave only its adapter and masks."""
    # It imports transformers, which the driver must not.
    from pipelines.model.load import check_models

    check_models(cfg)
    check_partitioning(cfg, "run")
    folder = Path(cfg.output_dir)
    run = RunFolder(cfg, "run")
    terminal = Terminal()
    run.path.mkdir(parents=True)
    try:
        with session(cfg.train, folder / "run.log", terminal):
            cost = train(run, sets, None, terminal)
            after = {"after": ModelConfig(path=str(folder / "model"))}
            evaluation, _ = score(cfg, after, scored_sets(sets), terminal)
        strengths = run.manifest()["strengths"]
        return Measured(evaluation.models["after"], cost["solve_s"] + cost["train_s"], strengths)
    finally:
        _clear(folder)


def _clear(folder: Path) -> None:
    """Delete everything in a trial's folder except its adapter and masks."""
    for path in folder.iterdir():
        if path.name not in KEPT_FILES:
            _remove(path)


def _remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
