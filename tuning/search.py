"""The search: Ray Tune runs trials that Optuna suggests, on workbenches that share one model and its statistics, or as
runs of their own.

Everything lies in the output folder: Optuna's journal, from which its sampler goes on, and `trials.jsonl`, one line a
trial that has ended, from which the result is made. The first trial is the configuration as it is.
"""

import json
import os
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipelines.cluster.resources import stage_of
from pipelines.cluster.session import session
from pipelines.cluster.tasks import result_of
from pipelines.config.load import to_yaml, with_values
from pipelines.config.schema import ConfigError, UnlearnConfig
from pipelines.evaluation.own_answers import drop_answers, with_own_answers
from pipelines.preflight import check_settings, preflight
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import Mirror, describe, mirrored_to_mlflow
from pipelines.training.trainer import forget_resume_points
from tuning.contracts import RUNGS
from tuning.page import write_page
from tuning.prepare import reference_scores, share_work
from tuning.record import TrialLog, TrialRecord, as_configured, scores_of
from tuning.score import Constraint, References, pick
from tuning.space import Space, default_space, load_space, read_space
from tuning.trial import TrialBackend, run_per_trial, shared_model

Method = Literal["tpe", "random", "grid"]
OBJECTIVES = {"distance": "min", "utility": "max"}
AS_IT_IS = "as_it_is"  # marks the trial of the configuration without changes
SPACE_FILE, BEST_FILE = "space.yaml", "best.yaml"


class SearchOptions(NamedTuple):
    """What the user asks of a search."""

    trials: int
    space: Path | None = None
    method: Method = "tpe"
    constraints: tuple[Constraint, ...] = ()
    resume: bool = False

    @classmethod
    def of(
        cls,
        trials: int,
        space: Path | None,
        method: str,
        constraints: Iterable[Constraint],
        *,
        resume: bool,
    ) -> "SearchOptions":
        """From the command line.

        Raises:
            ConfigError: a method that there is not.
        """
        methods: dict[str, Method] = {name: name for name in get_args(Method)}
        if method not in methods:
            raise ConfigError(f"--method: found '{method}', allowed: {', '.join(methods)}")
        return cls(trials, space, methods[method], tuple(constraints), resume)


class SearchResult(NamedTuple):
    """The result: trials by number, the pick, and the page."""

    trials: dict[int, TrialRecord]
    pick: int
    best: Path
    page: Path

    def summary(self) -> list[tuple[str, str]]:
        """The pick beside the configuration as it is, for the terminal."""
        own, first = self.trials[self.pick], as_configured(self.trials)
        assert own.score is not None
        rows = [(key, json.dumps(value)) for key, value in own.values.items()]
        as_it_is = first.score._asdict() if first is not None and first.score is not None else {}
        for name, value in own.score._asdict().items():
            before = f"  (as configured: {as_it_is[name]:.3f})" if name in as_it_is else ""
            rows.append((name, f"{value:.3f}{before}"))
        return rows


def search(cfg: UnlearnConfig, options: SearchOptions, terminal: Terminal) -> SearchResult:
    """Search a space of configurations; write the best one, its adapter and a page.

    Raises:
        ConfigError: something the user can mend; nothing has been run.
        RuntimeError: no trial keeps the constraints; the page is written.
    """
    check_settings(cfg, "tune")
    run = RunFolder(cfg, "tune")
    if run.manifest() and not options.resume:
        raise ConfigError(
            f"output_dir: {run.path} holds a search, allowed: a new folder, or --resume to go on with it"
        )
    with session(cfg.train, run.path / "run.log", terminal):
        space = _space(cfg, options, run)
        trials = (
            options.trials
            if options.method != "grid"
            else min(options.trials, 1 + len(space.points()))
        )
        sets, _ = preflight(cfg, "tune", terminal, run=run)
        run.begin(sets.inputs())
        (run.path / SPACE_FILE).write_text(
            yaml.safe_dump(space.tree(), sort_keys=False), encoding="utf-8"
        )
        sets = with_own_answers(cfg, sets, run.path, terminal)
        with mirrored_to_mlflow(run, terminal) as mirror:
            references = reference_scores(cfg, sets, run.path, terminal)
            if _fits_a_workbench(cfg, space):
                shared = share_work(cfg, space, sets, terminal)
                backend = shared_model(shared, references)
            else:
                backend = run_per_trial(cfg, sets, references)
            log = TrialLog(run.path, mirror, terminal, trials)
            if log.left:
                _run_trials(cfg, backend, space, options, log)
            return _finish(run, backend, options, log, references, mirror)


def _fits_a_workbench(cfg: UnlearnConfig, space: Space) -> bool:
    """Whether trials can share a language model in one process, as it is; else each is a run of its own."""
    prunes = cfg.prune.method != "none" or any(
        own.key.startswith("prune.") for own in space.dimensions
    )
    return cfg.task == "causal_lm" and not prunes and stage_of(cfg) < 3


def _space(cfg: UnlearnConfig, options: SearchOptions, run: RunFolder) -> Space:
    """The space of the file, of the search that goes on, or the default one."""
    before = run.path / SPACE_FILE
    if options.space is None and not before.exists():
        depth = _depth(cfg) if cfg.task == "causal_lm" else 0
        return read_space(default_space(cfg, depth), cfg, "the default space")
    space = load_space(options.space or before, cfg)
    if before.exists() and space != load_space(before, cfg):
        raise ConfigError(
            f"--space: {options.space} differs from the space of the search in {run.path}, allowed: the same"
        )
    return space


def _depth(cfg: UnlearnConfig) -> int:
    """Blocks of the model; asked in a task, since the driver imports none of what that takes."""

    def blocks(model: Any) -> int:
        from pipelines.model.load import load_model_config

        return int(load_model_config(model).get_text_config().num_hidden_layers)

    return result_of(ray.remote(num_cpus=1)(blocks).remote(cfg.model))


def _run_trials(
    cfg: UnlearnConfig,
    backend: TrialBackend,
    space: Space,
    options: SearchOptions,
    log: TrialLog,
) -> None:
    by_gradient = cfg.train.steps > 0 or any(
        dimension.key == "train.steps" for dimension in space.dimensions
    )
    asha = ASHAScheduler(
        metric="distance", mode="min", max_t=RUNGS, grace_period=1, reduction_factor=2
    )
    folder = log.folder / "checkpoints"
    _quiet_tune()
    tune.Tuner(
        backend.trainable,
        tune_config=tune.TuneConfig(
            search_alg=_sampled(space, options, cfg.seed, log),
            scheduler=asha if by_gradient and backend.has_rungs else None,
            num_samples=log.left,
            max_concurrent_trials=backend.concurrent_trials,
            reuse_actors=True,
            trial_dirname_creator=_folder_name,
        ),
        run_config=tune.RunConfig(
            name=f"tune-{time.time_ns()}",
            storage_path=str(folder),
            verbose=0,
            callbacks=[log],
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()


def _sampled(space: Space, options: SearchOptions, seed: int, log: TrialLog) -> Any:
    """Ray Tune's Optuna search, whose study is told what the log knows."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed += len(log.trials)  # a search that goes on must not draw the same values again
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True
        ),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "grid": lambda: optuna.samplers.RandomSampler(seed=seed),  # its points are given
    }

    found = OptunaSearch(
        partial(_suggest, space),
        metric=list(OBJECTIVES),
        mode=list(OBJECTIVES.values()),
        sampler=samplers[options.method](),
        storage=JournalStorage(JournalFileBackend(str(log.folder / "optuna.log"))),
        study_name="search",
    )
    study = found._ot_study
    assert study is not None
    if study.trials:
        log.settle(study)
    else:
        study.enqueue_trial({}, user_attrs={AS_IT_IS: True})
        for point in space.points() if options.method == "grid" else ():
            study.enqueue_trial(point)
    return found


def _suggest(space: Space, trial: Any) -> dict[str, Any]:
    """Return the trial's configuration for Tune: its number, and its values as JSON."""
    values = {} if AS_IT_IS in trial.user_attrs else space.suggest(trial)
    return {"number": trial.number, "values": json.dumps(values)}


def _folder_name(trial: Any) -> str:
    return f"{trial.config['number']:04d}"


def _quiet_tune() -> None:
    """Tune without its own files and signal handler: trials.jsonl is the record, Ctrl-C a KeyboardInterrupt."""
    os.environ.update(TUNE_DISABLE_SIGINT_HANDLER="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")


def _finish(
    run: RunFolder,
    backend: TrialBackend,
    options: SearchOptions,
    log: TrialLog,
    references: References,
    mirror: Mirror,
) -> SearchResult:
    """Pick, write best.yaml and its adapter, draw the page, tell MLflow."""
    cfg = run.cfg
    forget_resume_points(cfg)
    drop_answers(run.path)
    scores = scores_of(log.trials)
    chosen = pick(scores, options.constraints)
    page = write_page(run.path, log.trials, chosen, options.constraints, references)
    if chosen is None:
        wanted = ", ".join(map(str, options.constraints))
        raise RuntimeError(f"none of {len(log.trials)} trials keeps {wanted}; the page is {page}")
    best = with_values(cfg, {**log.trials[chosen].values, "output_dir": f"{run.path}-best"})
    (run.path / BEST_FILE).write_text(to_yaml(best), encoding="utf-8")
    backend.save_adapter(log.trials[chosen], run.path)
    run.update(pick=chosen)
    mirror.send()
    run.update(mlflow=describe(mirror, run, is_complete=False))
    run.seal()
    return SearchResult(log.trials, chosen, run.path / BEST_FILE, page)
