"""The training loop of a worker: build or resume, solve, step, report resume points."""

import time
from collections.abc import Mapping
from typing import Any, Protocol

import ray.train
import torch
from ray.train import Checkpoint
from torch import Tensor

from pipelines.encoding.encoder import build_encoder
from pipelines.model.engine import (
    Engine,
    EngineState,
    deepspeed_settings,
    peak_memory_bytes,
    zero3_loading,
)
from pipelines.training.build import build_module
from pipelines.training.job import Job
from pipelines.training.resume_point import ResumePoint, read_point, report_point
from pipelines.training.solving import Solving
from pipelines.training.statistics_point import read_statistics
from pipelines.training.worker import Worker
from pipelines.training.worker_rows import StepRows, WorkerRows
from rfa import exchange
from rfa.batch import Row, TokenCounts, UnlearnBatch, refusals_of
from rfa.objective import ResidualAlignment
from rfa.settings import STOP_EVERY, STOP_ROWS
from rfa.stopping import has_forgotten
from rfa.targets import FeatureSums


class Loss(Protocol):
    """A named tuple of scalars: the objective's total and its terms."""

    total: Tensor

    def _asdict(self) -> dict[str, Tensor]: ...


def run_worker(job: Job) -> None:
    """Build the model, resume, solve or train, and report resume points."""
    train = job.cfg.train
    world_size = ray.train.get_context().get_world_size()
    if train.gpus_per_worker == 0:
        torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    # LoRA's A and dropout draw from it.
    torch.manual_seed(job.cfg.seed)
    deepspeed = deepspeed_settings(train, job.stage, full=job.kind == "finetune")
    # transformers holds this object weakly, and asks it how to load weights under ZeRO-3.
    keep_alive = zero3_loading(deepspeed)
    rows = WorkerRows(job, build_encoder(job.cfg))
    module, pruned = build_module(job, rows)
    engine = Engine(module, deepspeed, world_size)
    worker = Worker(job, engine, module, rows, pruned)
    if job.kind == "prepare":
        Solving(worker).prepare(ray.train.get_checkpoint())
    else:
        TrainingLoop(worker).run()
    del keep_alive


class TrainingLoop:
    """Solve an adapter or train parameters on one worker, in step with the others."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.job, self.engine, self.module = worker.job, worker.engine, worker.module
        self.rows = worker.rows
        self.seconds = 0.0
        self.tokens = 0
        self.solve_s = 0.0
        # The strengths that the solver tried. The chosen one is the last.
        self.trials: list[dict[str, float]] = []

    def run(self) -> None:
        """Run all steps from the last resume point on."""
        checkpoint = ray.train.get_checkpoint()
        if isinstance(self.module, ResidualAlignment):
            checkpoint = self._solve_from(checkpoint)
            # Targets follow from the base model and the rows, so resume points do not hold them.
            is_fitted = self.module.targets is not None
            if self.job.steps > 0 and self.module.objective.aligns and not is_fitted:
                self._fit_targets(self.module)
        watched = self._watched()
        step = 0 if checkpoint is None else self._resume(checkpoint)
        steps = self.rows.steps(step)
        started = time.monotonic()
        while step < self.job.steps:
            began = time.monotonic()
            rate = self.job.rate(step)
            if isinstance(self.module, ResidualAlignment):
                self.module.progress = (step + 1) / self.job.steps
            metrics = self.step(next(steps), rate)
            # The metrics are those of all workers already, so one worker reports them.
            if self.worker.rank == 0:
                step_s = max(time.monotonic() - began, 1e-9)
                metrics["tokens_per_s"] = metrics.pop("tokens") / step_s
                self.job.messages.put({"step": step, **metrics, "learning_rate": rate})
            step += 1
            has_more = step < self.job.steps
            if has_more and step % STOP_EVERY == 0 and self._may_stop(watched):
                if self.worker.rank == 0:
                    self.job.messages.put({"stopped_after": step})
                # A restarted run, too, has none left.
                step = self.job.steps
            # A resume point's time counts to the step after it.
            self.seconds += time.monotonic() - started
            started = time.monotonic()
            if step % self.job.cfg.train.checkpoint_every == 0 and step < self.job.steps:
                self._report(step, final=False)
        self._report(step, final=True)

    def step(self, rows: StepRows, rate: float) -> dict[str, float]:
        """Take one optimizer step and return its loss, the terms, and its tokens over all workers.

        Each micro-batch's loss is its share of the mean over the whole step, so the step's counts
        must be known before the first forward.
        """
        parts = self.job.cfg.train.accumulation
        batches: list[UnlearnBatch] = []
        sums = {"tokens": 0.0}
        for part in range(parts):
            forget = rows.forget[part::parts]
            refusals: list[Row] = []
            if isinstance(self.module, ResidualAlignment):
                refusals = refusals_of(forget, self.module.objective)
            batch = self.worker.batch(rows.retain[part::parts], forget, refusals)
            batches.append(batch)
            sums["tokens"] += int(batch.attention_BT.sum())
            _add(sums, batch.counts(self.job.cfg.objective.tokens)._asdict())
        totals = self.worker.all_reduce(sums)
        tokens = totals.pop("tokens")
        counts = TokenCounts(**totals)
        terms: dict[str, float] = {}
        for batch in batches:
            loss: Loss = self.engine(batch, counts)
            self.engine.backward(loss.total)
            # DeepSpeed counts the calls, and updates parameters with a step's last micro-batch.
            self.engine.step(rate)
            _add(terms, {name: term.detach() for name, term in loss._asdict().items()})
        means = self.worker.all_reduce(terms)
        self.tokens += int(tokens)
        return {"loss": means.pop("total"), **means, "tokens": tokens}

    def _watched(self) -> list[UnlearnBatch]:
        """Return this worker's share of the rows by which steps may end early, if any may."""
        module = self.module
        if not isinstance(module, ResidualAlignment) or module.objective.stop_at is None:
            return []
        batches = -(-STOP_ROWS // self.job.cfg.train.forget_batch_size)
        return [self.worker.batch([], rows) for rows in self.rows.once("forget", batches)]

    def _may_stop(self, watched: list[UnlearnBatch]) -> bool:
        """Return whether enough is forgotten; all workers decide the same."""
        if not watched:
            return False
        assert isinstance(self.module, ResidualAlignment)
        return has_forgotten(self.module, watched, self.worker.all_reduce)

    def _fit_targets(self, module: ResidualAlignment) -> None:
        """Fit the targets to the base features of the first retain rows of all workers."""
        totals = {name: FeatureSums() for name in module.hooks.names}
        self.worker.sampled_rows = 0
        for batch, sample_tokens in self.worker.sampled_batches():
            if not sample_tokens:
                break
            for name, sums in module.feature_sums(batch, sample_tokens).items():
                totals[name].merge(sums)
        module.fit(exchange.merged_features(totals))

    def _solve_from(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        """Solve, unless a resume point holds the solution; return the point to train on from.

        A solution is saved as a resume point if training follows.
        """
        if self.job.cfg.solve.mode == "off":
            return checkpoint
        if checkpoint is not None and read_statistics(checkpoint) is None:
            return checkpoint
        solved = Solving(self.worker).run(checkpoint)
        self.trials, self.tokens = solved.trials, solved.tokens
        self.seconds = self.solve_s = solved.seconds
        if self.job.steps > 0:
            self._report(0, final=False)
        return None

    def _resume(self, checkpoint: Checkpoint) -> int:
        """Load a resume point and return the step to continue with.

        The point may also be the end of a run that was not exported.
        """
        point = read_point(checkpoint)
        step = int(point.progress["step"])
        if point.moments is None:  # nothing has been trained yet, or all has
            self.engine.place(point.parameters)
        else:
            rng = point.moments.pop("rng")
            # A step at learning rate 0 creates the optimizer's states, which `load` then fills.
            self.step(next(self.rows.steps(step)), rate=0.0)
            self.engine.load(EngineState(point.parameters, point.moments), step)
            # Last, as the step above has drawn from the generator.
            torch.set_rng_state(rng)
        self.seconds = point.progress["seconds"]
        self.tokens = point.progress["tokens"]
        self.solve_s = point.progress["solve_s"]
        self.trials = point.progress["trials"]
        return step

    def _report(self, step: int, *, final: bool) -> None:
        """Report from every worker, as Ray Train requires; rank 0 adds the resume point.

        Before the first step and after the last one there are no moments to save.
        """
        with_moments = step > 0 and not final
        state = self.engine.state(with_moments=with_moments)
        progress = {
            "step": step,
            "seconds": self.seconds,
            "solve_s": self.solve_s,
            "trials": self.trials,
            "tokens": self.tokens,
            "peak_memory_bytes": peak_memory_bytes(self.engine.device),
            "num_workers": self.worker.world_size,
        }
        if self.worker.rank > 0:
            ray.train.report(progress, checkpoint=None)
            return
        moments: dict[str, Tensor] | None = None
        if with_moments:
            moments = {**state.moments, "rng": torch.get_rng_state()}
        point = ResumePoint(progress, state.parameters, moments, self.worker.pruned.norms)
        report_point(point, self.job.cfg.output_dir)


def _add(totals: dict[str, float], values: Mapping[str, Any]) -> None:
    """Add numbers or scalar tensors to totals of the same names."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + float(value)
