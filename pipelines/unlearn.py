"""The flow of `run`, `finetune`, `prepare` and `evaluate`.

`unlearn` reads from top to bottom, from the configuration to the report. The functions below it
are its steps.
"""

import time
from typing import Any

from ray.data import Dataset
from ray.train import Result

from pipelines.cluster.session import session, temporary_log
from pipelines.cluster.tasks import on_every_node, on_this_node, result_of
from pipelines.config.data import HELD_SETS
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets, as_retained, joined
from pipelines.evaluation.entries import Evaluation
from pipelines.evaluation.own_answers import (
    answered_only,
    drop_answers,
    with_own_answers,
)
from pipelines.evaluation.pool import evaluate, evaluation_work
from pipelines.evaluation.verdict import verdict
from pipelines.preflight import check_settings, oracles_of, preflight
from pipelines.report.page import write_report
from pipelines.storage.prepared import STATISTICS, model_files_digest
from pipelines.storage.run_folder import RunFolder
from pipelines.terminal import Terminal
from pipelines.tracking.mirror import (
    Mirror,
    describe,
    lacks_records,
    mirrored_to_mlflow,
    preload,
)
from pipelines.training.progress import ProgressLog
from pipelines.training.trainer import Trainer, forget_resume_points


def unlearn(cfg: UnlearnConfig, terminal: Terminal) -> RunFolder:
    """Remove the forget set's influence from a model, score the result and write the report.

    Utility rows without an answer get the model's own first. An interrupted run continues where it
    stopped. A complete one is returned as it is.

    Raises:
        ConfigError: the user can fix it. Nothing has been trained or overwritten.
    """
    check_settings(cfg, "run")
    run = RunFolder(cfg, "run")
    if run.is_complete:
        # MLflow may have been down when the run ended.
        if lacks_records(run):
            send_records(run, terminal)
        return run
    with run.output.working_copy(), session(cfg.train, run.path / "run.log", terminal, preload):
        sets = preflight(cfg, "run", terminal, run=run).sets
        # From here on the folder is bound to these inputs: a restart with others is refused.
        run.begin(sets.inputs(), sets.forget_ids)
        sets = with_own_answers(cfg, sets, run.path, terminal)
        with mirrored_to_mlflow(run, terminal) as mirror:
            # A restart after training finds its cost, and the model in the folder.
            cost = run.manifest().get("cost") or train(run, sets, mirror, terminal)
            # Scoring workers may run on nodes that cannot see the folder.
            with on_every_node(run.output, "model"):
                evaluation, evaluate_s = score(cfg, result_models(run), sets, terminal)
            run.write_scores({**cost, "evaluate_s": evaluate_s}, evaluation.content())
            record(run, mirror)
    return run


def finetune(cfg: UnlearnConfig, terminal: Terminal) -> RunFolder:
    """Train all parameters on `finetune.sets`, to make a target model or the retrain oracle.

    Raises:
        ConfigError: as `unlearn`, or a set that `data` does not give, or rows without an answer.
    """
    check_settings(cfg, "finetune")
    run = RunFolder(cfg, "finetune")
    if run.is_complete:
        return run
    with run.output.working_copy(), session(cfg.train, run.path / "run.log", terminal, preload):
        sets = preflight(cfg, "finetune", terminal, run=run).sets
        rows = sets.union(cfg.finetune.sets)
        run.begin(sets.inputs())
        streams = {"retain": (rows, cfg.finetune.batch_size)}
        if cfg.finetune.salient is not None:
            # SalUn ranks weights by the forget set's gradient, before it trains.
            streams["forget"] = (sets.forget, cfg.finetune.batch_size)
        trainer = Trainer(cfg, "finetune", streams)
        steps = cfg.finetune.epochs * trainer.batches["retain"]
        started = time.monotonic()
        with ProgressLog(run.output, "Fine-tuning", steps, terminal) as losses:
            result = trainer.fit(
                steps=steps,
                learning_rate=cfg.finetune.learning_rate,
                final_rate=0.1,
                listener=losses.on_message,
            )
        cost = cost_of(result, time.monotonic() - started)
        run.update(cost={**cost, **export(run, result, full=True)})
        run.seal()
        run.output.upload()
        # Last: until the results are sealed and uploaded, a restart needs the resume point.
        forget_resume_points(cfg)
    return run


def prepare(cfg: UnlearnConfig, terminal: Terminal) -> RunFolder:
    """Collect the statistics of all rows that a model was trained on, once for many requests.

    An interrupted one continues from its last resume point (`solve.checkpoint_every`).

    Raises:
        ConfigError: as `unlearn`, or a method that needs more than sums over rows.
    """
    check_settings(cfg, "prepare")
    run = RunFolder(cfg, "prepare")
    if run.is_complete:
        return run
    with run.output.working_copy(), session(cfg.train, run.path / "run.log", terminal, preload):
        sets = preflight(cfg, "prepare", terminal, run=run).sets
        run.begin(sets.inputs())
        run.update(model_files=model_files_digest(cfg.model.path))
        rows = [as_retained(sets.forget, sets.counts["retain"]), sets.retain]
        if sets.utility is not None:
            rows.append(sets.utility)
        trainer = Trainer(cfg, "prepare", {"retain": (joined(rows), cfg.train.retain_batch_size)})
        started = time.monotonic()
        with ProgressLog(run.output, "Preparing", 0, terminal) as log:
            result = trainer.fit(
                steps=0, learning_rate=0.0, final_rate=0.0, listener=log.on_message
            )
        assert result.checkpoint is not None
        result.checkpoint.to_directory(str(run.path / STATISTICS))
        prepare_s = time.monotonic() - started
        run.update(cost={"tokens": _metrics(result)["tokens"], "prepare_s": prepare_s})
        run.seal()
        run.output.upload()
        forget_resume_points(cfg)
    return run


def evaluate_model(cfg: UnlearnConfig, model: ModelConfig, terminal: Terminal) -> Evaluation:
    """Score any model folder on the sets, and the oracles where any are configured.

    Utility rows without an answer are left out, since there is nothing to score.
    """
    models = {"model": model, **oracles_of(cfg)}
    with temporary_log() as log, session(cfg.train, log, terminal, preload):
        sets = preflight(cfg, "evaluate", terminal, model=model).sets
        return score(cfg, models, answered_only(sets), terminal)[0]


def train(run: RunFolder, sets: Sets, mirror: Mirror | None, terminal: Terminal) -> dict[str, Any]:
    """Solve or train the adapter, write it and the merged model, and return the run's cost."""
    cfg = run.cfg
    trainer = Trainer(cfg, "unlearn", streams_of(cfg, sets))
    started = time.monotonic()
    with ProgressLog(run.output, "Unlearning", cfg.train.steps, terminal, mirror) as losses:
        result = trainer.fit(
            steps=cfg.train.steps,
            learning_rate=cfg.train.learning_rate,
            final_rate=0.0,
            listener=losses.on_message,
        )
    cost = cost_of(result, time.monotonic() - started)
    cost |= export(run, result)
    run.update(cost=cost, strengths=_metrics(result)["trials"])
    # Evaluation can take as long as training, and the model must survive a node lost in it.
    run.output.upload()
    forget_resume_points(cfg)
    return cost


def streams_of(cfg: UnlearnConfig, sets: Sets) -> dict[str, tuple[Dataset, int]]:
    """Return the rows that the workers of a run read, with how many of them a step."""
    batch_size = cfg.train.retain_batch_size
    streams = {"forget": (sets.forget, cfg.train.forget_batch_size)}
    if cfg.solve.prepared is None:
        streams["retain"] = (sets.union(HELD_SETS, present_only=True), batch_size)
    else:
        streams["removed"] = (as_retained(sets.forget, sets.counts["retain"]), batch_size)
        if sets.earlier is not None:
            streams["retain"] = (sets.earlier, batch_size)
    if cfg.solve.reads_holdout:
        assert sets.holdout is not None  # `check_holdout` has required it
        streams["holdout"] = (sets.holdout, cfg.train.forget_batch_size)
    return streams


def score(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets, terminal: Terminal
) -> tuple[Evaluation, float]:
    """Score each model on the sets. Returns the scores, and the seconds they took."""
    started = time.monotonic()
    bar = terminal.bar("Evaluating " + ", ".join(models), evaluation_work(cfg, models, sets))
    evaluation = evaluate(cfg, models, sets, bar.advance)
    return evaluation, time.monotonic() - started


def record(run: RunFolder, mirror: Mirror) -> None:
    """Send scores and adapter to MLflow, seal the folder with its verdict, write the page.

    The folder is sealed after the utility answers are gone, because the seal has a digest of every
    file.
    """
    mirror.send()
    run.update(mlflow=describe(mirror, run, is_complete=False))
    drop_answers(run.path)
    run.update(verdict=verdict(run.scores()).level)
    run.seal()
    write_report(run.path)


def send_records(run: RunFolder, terminal: Terminal) -> None:
    """Send the records of a complete run that MLflow lacks, and show its MLflow run on the page."""
    with run.output.working_copy(), mirrored_to_mlflow(run, terminal) as mirror:
        if mirror.is_complete:
            run.update(mlflow=describe(mirror, run, is_complete=False))
            write_report(run.path)


def export(run: RunFolder, result: Result, *, full: bool = False) -> dict[str, float]:
    """Write adapter and merged model. Returns the part of `cost` that is known then.

    A task on the driver's node does it, where the run folder is: the driver itself holds no model
    and does not import transformers.
    """
    cfg, folder, checkpoint = run.cfg, str(run.path), result.checkpoint
    assert checkpoint is not None

    def write() -> dict[str, float]:
        from pipelines.training.export import write_model

        return write_model(cfg, checkpoint, folder, full)

    return result_of(on_this_node(write).remote())


def result_models(run: RunFolder) -> dict[str, ModelConfig]:
    """Return the models to compare: before, after and, where configured, the oracles."""
    after = ModelConfig(path=str(run.path / "model"))
    return {"before": run.cfg.model, "after": after, **oracles_of(run.cfg)}


def cost_of(result: Result, fit_s: float) -> dict[str, Any]:
    """Return the `cost` part of scores.json without evaluation and export.

    `solve_s` covers statistics, solves and the search for the strength. `train_s` is the rest of
    `fit_s`, starting the workers included. `num_workers` is the number at the end.
    """
    metrics = _metrics(result)
    return {
        "solve_s": metrics["solve_s"],
        "train_s": fit_s - metrics["solve_s"],
        "tokens": metrics["tokens"],
        "tokens_per_s": metrics["tokens"] / max(metrics["seconds"], 1e-9),
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "num_workers": metrics["num_workers"],
    }


def _metrics(result: Result) -> dict[str, Any]:
    assert result.metrics is not None
    return result.metrics
