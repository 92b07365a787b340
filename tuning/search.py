"""The search: Ray Tune runs trials that Optuna suggests.

Trials run on workbenches that share a model and its statistics, or as separate runs. The output
folder has Optuna's journal, from which its sampler goes on, and `trials.jsonl`, from which the
result is made, with one line for each trial that has ended. The first trial is the configuration as
it is.
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
from pipelines.config.unread import DECIDING
from pipelines.evaluation.own_answers import drop_answers, with_own_answers
from pipelines.preflight import check_read, check_settings, preflight
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import Mirror, describe, mirrored_to_mlflow
from pipelines.training.trainer import forget_resume_points
from tuning.contracts import RUNGS
from tuning.page import write_page
from tuning.prepare import reference_scores, share_work
from tuning.record import TrialLog, TrialRecord, as_configured, read_trials, scores_of
from tuning.score import Constraint, References, pick
from tuning.space import Space, default_space, load_space, read_space
from tuning.trial import TrialBackend, run_per_trial, shared_model

Method = Literal["tpe", "random", "grid"]
OBJECTIVES = {"distance": "min", "utility": "max"}
# Marks the trial of the configuration without changes.
AS_IT_IS = "as_it_is"
SPACE_FILE, BEST_FILE = "space.yaml", "best.yaml"


class SearchOptions(NamedTuple):
    """The options of a search on the command line."""

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
        """Make options of the command line's values.

        Raises:
            ConfigError: the method does not exist.
        """
        methods: dict[str, Method] = {name: name for name in get_args(Method)}
        if method not in methods:
            raise ConfigError(f"--method: found '{method}', allowed: {', '.join(methods)}")
        return cls(trials, space, methods[method], tuple(constraints), resume)


class SearchResult(NamedTuple):
    """Trials by number, the pick's number, its configuration file, and the page."""

    trials: dict[int, TrialRecord]
    pick: int
    best: Path
    page: Path

    def summary(self) -> list[tuple[str, str]]:
        """Return the pick's values, and its scores beside those of the configuration as it is."""
        best, first = self.trials[self.pick], as_configured(self.trials)
        assert best.score is not None
        rows = [(key, json.dumps(value)) for key, value in best.values.items()]
        for name, value in best.score._asdict().items():
            text = f"{value:.3f}"
            if first is not None and first.score is not None:
                text += f"  (as configured: {getattr(first.score, name):.3f})"
            rows.append((name, text))
        return rows


def search(cfg: UnlearnConfig, options: SearchOptions, terminal: Terminal) -> SearchResult:
    """Search a space of configurations, and write the best one, its adapter and a page.

    Raises:
        ConfigError: the user can mend the cause. Nothing has been run.
        RuntimeError: no trial meets the constraints. The page is written.
    """
    check_settings(cfg, "tune")
    run = RunFolder(cfg, "tune")
    if run.manifest() and not options.resume:
        raise ConfigError(
            f"output_dir: {run.path} holds a search, "
            "allowed: a new folder, or --resume to go on with it"
        )
    # Both files are the user's, who would wait for Ray to be told of a fault in them.
    given, ended = _given_space(cfg, options, run), read_trials(run.path)
    searched = [dimension.key for dimension in given.dimensions] if given else []
    # What the configuration as it is does not read may be there for the trials that do.
    if not set(DECIDING).intersection(searched):
        check_read(cfg)
    with session(cfg.train, run.path / "run.log", terminal):
        space = given or _default_space(cfg)
        trials = options.trials
        if options.method == "grid":
            trials = min(trials, 1 + len(space.points()))
        sets = preflight(cfg, "tune", terminal, run=run).sets
        run.begin(sets.inputs())
        # A resumed search must draw from the same space, whatever the defaults are by then.
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
            log = TrialLog(run.path, ended, mirror, terminal, trials)
            if log.left:
                _run_trials(cfg, backend, space, options, log)
            return _finish(run, backend, options, log, references, mirror)


def _fits_a_workbench(cfg: UnlearnConfig, space: Space) -> bool:
    """Return whether trials can share a language model in one process."""
    # A workbench takes an adapter off its model after each trial, but could not undo pruning.
    keys = [dimension.key for dimension in space.dimensions]
    prunes = cfg.prune.method != "none" or any(key.startswith("prune.") for key in keys)
    # Stage 3 is for models that do not fit one process.
    return cfg.task == "causal_lm" and not prunes and stage_of(cfg) < 3


def _given_space(cfg: UnlearnConfig, options: SearchOptions, run: RunFolder) -> Space | None:
    """Return the space of the user's file or of the resumed search, None without either."""
    before = run.path / SPACE_FILE
    if options.space is None and not before.exists():
        return None
    space = load_space(options.space or before, cfg)
    if before.exists() and space != load_space(before, cfg):
        raise ConfigError(
            f"--space: {options.space} differs from the space of the search in {run.path}, "
            "allowed: the same"
        )
    return space


def _default_space(cfg: UnlearnConfig) -> Space:
    """Return the space that goes with the configuration's mode. Needs Ray."""

    def count_blocks(model: Any) -> int:
        from pipelines.model.folder import load_model_config

        return int(load_model_config(model).get_text_config().num_hidden_layers)

    depth = 0
    if cfg.task == "causal_lm":
        # The driver must not import transformers, so a task reads the model's configuration.
        depth = result_of(ray.remote(num_cpus=1)(count_blocks).remote(cfg.model))
    return read_space(default_space(cfg, depth), cfg, "the default space")


def _run_trials(
    cfg: UnlearnConfig,
    backend: TrialBackend,
    space: Space,
    options: SearchOptions,
    log: TrialLog,
) -> None:
    """Run the trials that are left, and log each as it ends."""
    # Only trials with gradient steps are scored on the way, where ASHA can stop them.
    scheduler = None
    if backend.has_rungs and (cfg.train.steps > 0 or space.values("train.steps")):
        scheduler = ASHAScheduler(
            metric="distance", mode="min", max_t=RUNGS, grace_period=1, reduction_factor=2
        )
    # trials.jsonl is the record, so Tune writes no files of its own. Without Tune's signal handler
    # Ctrl-C is a KeyboardInterrupt, as everywhere else.
    os.environ.update(TUNE_DISABLE_SIGINT_HANDLER="1", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1")
    tune.Tuner(
        backend.trainable,
        tune_config=tune.TuneConfig(
            search_alg=_sampler(space, options, cfg.seed, log),
            scheduler=scheduler,
            num_samples=log.left,
            max_concurrent_trials=backend.concurrent_trials,
            # A workbench loads its model once, and not for each trial.
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config['number']:04d}",
        ),
        run_config=tune.RunConfig(
            # A new name at each start, under which Tune finds nothing of a search that was killed.
            name=f"tune-{time.time_ns()}",
            storage_path=str(log.folder / "checkpoints"),
            verbose=0,
            callbacks=[log],
            failure_config=tune.FailureConfig(max_failures=0),
            # The trials have no checkpoints of Tune's: the pick's adapter is computed again, or
            # lies in the folder of its run.
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()


def _sampler(space: Space, options: SearchOptions, seed: int, log: TrialLog) -> Any:
    """Return Ray Tune's Optuna search, with the trials of the log in its study."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A resumed search must not draw the same values again.
    seed += len(log.trials)
    if options.method == "tpe":
        # `group` serves keys that only some trials have, `constant_liar` trials that run at once.
        sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, group=True, constant_liar=True
        )
    else:
        # A grid's points are enqueued below, and nothing is drawn.
        sampler = optuna.samplers.RandomSampler(seed=seed)
    search_algorithm = OptunaSearch(
        # Tune pickles its search algorithm, so this must be a function of a module.
        partial(_suggest, space),
        metric=list(OBJECTIVES),
        mode=list(OBJECTIVES.values()),
        sampler=sampler,
        storage=JournalStorage(JournalFileBackend(str(log.folder / "optuna.log"))),
        study_name="search",
    )
    # OptunaSearch has no public way to its study.
    study = search_algorithm._ot_study
    assert study is not None
    if study.trials:
        log.settle(study)
    else:
        study.enqueue_trial({}, user_attrs={AS_IT_IS: True})
        if options.method == "grid":
            for point in space.points():
                study.enqueue_trial(point)
    return search_algorithm


def _suggest(space: Space, trial: Any) -> dict[str, Any]:
    """Return the trial's configuration for Tune: its number, and its values as JSON."""
    values = {} if AS_IT_IS in trial.user_attrs else space.suggest(trial)
    return {"number": trial.number, "values": json.dumps(values)}


def _finish(
    run: RunFolder,
    backend: TrialBackend,
    options: SearchOptions,
    log: TrialLog,
    references: References,
    mirror: Mirror,
) -> SearchResult:
    """Pick a trial, write best.yaml, its adapter and the page, and send the result to MLflow."""
    cfg = run.cfg
    # All trials have ended, and these serve them alone.
    forget_resume_points(cfg)
    drop_answers(run.path)
    chosen = pick(scores_of(log.trials), options.constraints)
    page = write_page(run.path, log.trials, chosen, options.constraints, references)
    if chosen is None:
        wanted = ", ".join(map(str, options.constraints))
        raise RuntimeError(f"none of {len(log.trials)} trials keeps {wanted}; the page is {page}")
    best_trial = log.trials[chosen]
    best = with_values(cfg, {**best_trial.values, "output_dir": f"{run.path}-best"})
    (run.path / BEST_FILE).write_text(to_yaml(best), encoding="utf-8")
    backend.save_adapter(best_trial, run.path)
    run.update(pick=chosen)
    mirror.send()
    run.update(mlflow=describe(mirror, run, is_complete=False))
    run.seal()
    return SearchResult(log.trials, chosen, run.path / BEST_FILE, page)
