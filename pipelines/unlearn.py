"""The flow: one screen from the data to the report. `unlearn` reads from top to bottom; the rest is its vocabulary."""

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.cluster.session import session
from pipelines.cluster.tasks import on_every_node, on_this_node, result_of
from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.data.sets import Sets
from pipelines.evaluation.metrics.keys import versions
from pipelines.evaluation.own_answers import (
    answered_only,
    drop_answers,
    with_own_answers,
)
from pipelines.evaluation.pool import evaluate, evaluation_work
from pipelines.preflight import check_settings, oracle_of, preflight
from pipelines.report.page import write_report
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

Scores = dict[str, dict[str, float | None]]


def unlearn(cfg: UnlearnConfig, terminal: Terminal) -> RunFolder:
    """Remove the forget set's influence from a model, write the result and its proof.

    Utility rows without an answer get the model's own first. A run that was interrupted goes on where it was; one that
    is complete is left as it is.

    Raises:
        ConfigError: something the user can mend; nothing has been trained or overwritten.
    """
    check_settings(cfg, "run")
    run = RunFolder(cfg, "run")
    if run.is_complete:
        if lacks_records(run):
            send_records(run, terminal)
        return run
    with run.output.working_copy(), session(cfg.train, run.path / "run.log", terminal, preload):
        sets, _ = preflight(cfg, "run", terminal, run=run)
        run.begin(sets.inputs())
        sets = with_own_answers(cfg, sets, run.path, terminal)
        with mirrored_to_mlflow(run, terminal) as mirror:
            cost = run.manifest().get("cost") or train(run, sets, mirror, terminal)
            with on_every_node(run.output, "model"):
                scores, evaluate_s = score(cfg, result_models(run), sets, terminal)
            cost = {**cost, "evaluate_s": evaluate_s}
            run.write_scores(scores, cost, versions(scores.values()))
            record(run, mirror)
    return run


def finetune(cfg: UnlearnConfig, terminal: Terminal) -> RunFolder:
    """Train all of the model's parameters on `finetune.sets`: the target model, or the retrain oracle.

    Raises:
        ConfigError: as `unlearn`, for a set that `data` does not give, and for rows without an answer.
    """
    check_settings(cfg, "finetune")
    run = RunFolder(cfg, "finetune")
    if run.is_complete:
        return run
    with run.output.working_copy(), session(cfg.train, run.path / "run.log", terminal, preload):
        sets, _ = preflight(cfg, "finetune", terminal, run=run)
        rows = sets.union(cfg.finetune.sets)
        run.begin(sets.inputs())
        streams = {"retain": (rows, cfg.finetune.batch_size)}
        if cfg.finetune.salient is not None:
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
        run.update(cost={**cost, **export(run, checkpoint_of(result), full=True)})
        run.seal()
        run.output.upload()
        forget_resume_points(cfg)
    return run


def evaluate_model(cfg: UnlearnConfig, model: ModelConfig, terminal: Terminal) -> Scores:
    """Score any model folder on the sets, beside the oracle when one is configured.

    Utility rows without an answer are left out: there is nothing to score.
    """
    models = {"model": model, **oracle_of(cfg, "oracle")}
    with (
        TemporaryDirectory() as folder,
        session(cfg.train, Path(folder) / "run.log", terminal, preload),
    ):
        sets, _ = preflight(cfg, "evaluate", terminal, model=model)
        return score(cfg, models, answered_only(sets), terminal)[0]


def train(run: RunFolder, sets: Sets, mirror: Mirror | None, terminal: Terminal) -> dict[str, Any]:
    """Train the adapter, write it and the merged model; returns what it cost."""
    cfg = run.cfg
    keep = sets.union(("retain", "utility"), present_only=True)
    streams = {
        "retain": (keep, cfg.train.retain_batch_size),
        "forget": (sets.forget, cfg.train.forget_batch_size),
    }
    if cfg.solve.mode != "off" and cfg.solve.strength == "auto":
        assert sets.holdout is not None
        streams["holdout"] = (sets.holdout, cfg.train.forget_batch_size)
    trainer = Trainer(cfg, "unlearn", streams)
    started = time.monotonic()
    with ProgressLog(run.output, "Unlearning", cfg.train.steps, terminal, mirror) as losses:
        result = trainer.fit(
            steps=cfg.train.steps,
            learning_rate=cfg.train.learning_rate,
            final_rate=0.0,
            listener=losses.on_message,
        )
    cost = cost_of(result, time.monotonic() - started)
    cost |= export(run, checkpoint_of(result))
    run.update(cost=cost, strengths=trials_of(result))
    run.output.upload()
    forget_resume_points(cfg)
    return cost


def score(
    cfg: UnlearnConfig, models: dict[str, ModelConfig], sets: Sets, terminal: Terminal
) -> tuple[Scores, float]:
    """Scores of each model, and the seconds they took."""
    started = time.monotonic()
    bar = terminal.bar("Evaluating " + ", ".join(models), evaluation_work(cfg, models, sets))
    scores = evaluate(cfg, models, sets, bar.advance)
    return scores, time.monotonic() - started


def record(run: RunFolder, mirror: Mirror) -> None:
    """Send scores and adapter to MLflow, seal the folder, write the page."""
    mirror.send()
    run.update(mlflow=describe(mirror, run, is_complete=False))
    drop_answers(run.path)
    run.seal()
    write_report(run.path)


def send_records(run: RunFolder, terminal: Terminal) -> None:
    """Send what MLflow lacks of a finished run, and put the run's number there on the page."""
    with run.output.working_copy(), mirrored_to_mlflow(run, terminal) as mirror:
        if mirror.is_complete:
            run.update(mlflow=describe(mirror, run, is_complete=False))
            write_report(run.path)


def export(run: RunFolder, checkpoint: Any, *, full: bool = False) -> dict[str, float]:
    """Write adapter and merged model, in a task on the driver's node: the driver holds no model. Returns the part of
    `cost` that is known then."""
    return result_of(on_this_node(_write_model).remote(run.cfg, checkpoint, str(run.path), full))


def _write_model(*arguments: Any) -> dict[str, float]:
    from pipelines.training.export import write_model

    return write_model(*arguments)


def result_models(run: RunFolder) -> dict[str, ModelConfig]:
    """The models that are compared: before, after and, when configured, the oracle."""
    after = ModelConfig(path=str(run.path / "model"))
    return {"before": run.cfg.model, "after": after, **oracle_of(run.cfg, "oracle")}


def cost_of(result: Any, train_s: float) -> dict[str, Any]:
    """The `cost` part of scores.json, but for evaluation. `solve_s` is statistics, solves and the search for the
    strength together; `train_s` is the rest, and includes starting the workers."""
    metrics = result.metrics
    return {
        "solve_s": metrics["solve_s"],
        "train_s": train_s - metrics["solve_s"],
        "tokens": metrics["tokens"],
        "tokens_per_s": metrics["tokens"] / max(metrics["seconds"], 1e-9),
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "num_workers": metrics["num_workers"],  # at the end
    }


def trials_of(result: Any) -> list[dict[str, float]]:
    """The strengths that the solver tried, the chosen one last; empty where the strength was given."""
    return result.metrics["trials"]


def checkpoint_of(result: Any) -> Any:
    """The last checkpoint of a finished training run."""
    assert result.checkpoint is not None
    return result.checkpoint
