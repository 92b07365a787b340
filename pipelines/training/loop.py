"""The training loop of a worker: build or resume, solve, step, report resume points."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import ray.train
import torch
from ray.train import Checkpoint
from torch import Tensor, nn

from pipelines.encoding.encoder import build_encoder
from pipelines.model.engine import (
    Engine,
    EngineState,
    deepspeed_settings,
    peak_memory_bytes,
    zero3_loading,
)
from pipelines.training.build import Pruned, build_module
from pipelines.training.job import Job
from pipelines.training.resume_point import ResumePoint, read_point, report_point
from pipelines.training.statistics_point import (
    StatisticsPoint,
    add_statistics,
    read_statistics,
    report_statistics,
)
from pipelines.training.strength import WorkerSolver
from pipelines.training.worker_rows import StepRows, WorkerRows, sampled_tokens
from rfa import exchange
from rfa.adapters import ADAPTER
from rfa.batch import Row, TokenCounts, UnlearnBatch, refusals_of
from rfa.objective import ResidualAlignment
from rfa.settings import STOP_EVERY, STOP_ROWS
from rfa.stopping import has_forgotten
from rfa.targets import FeatureSums

# A small set of up to this many tokens a worker is one batch: the solver then needs one forward.
TOKENS_AT_ONCE = 16384


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
    TrainingLoop(job, engine, module, rows, pruned).run()
    del keep_alive


class TrainingLoop:
    """Solve an adapter or train parameters on one worker, in step with the others."""

    def __init__(
        self, job: Job, engine: Engine, module: nn.Module, rows: WorkerRows, pruned: Pruned
    ) -> None:
        self.job = job
        self.engine = engine
        self.module = module
        self.rows = rows
        self.pruned = pruned
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.seconds = 0.0
        self.tokens = 0
        self.solve_s = 0.0
        self.sampled_rows = 0  # of the retain set, for the targets' clusters
        # The strengths that the solver tried. The chosen one is the last.
        self.trials: list[dict[str, float]] = []

    def run(self) -> None:
        """Run all steps from the last resume point on."""
        checkpoint = ray.train.get_checkpoint()
        if isinstance(self.module, ResidualAlignment):
            checkpoint = self._solve_from(checkpoint, self.module)
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
            if self.rank == 0:
                step_s = max(time.monotonic() - began, 1e-9)
                metrics["tokens_per_s"] = metrics.pop("tokens") / step_s
                self.job.messages.put({"step": step, **metrics, "learning_rate": rate})
            step += 1
            has_more = step < self.job.steps
            if has_more and step % STOP_EVERY == 0 and self._may_stop(watched):
                if self.rank == 0:
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
            batch = self._batch(rows.retain[part::parts], forget, refusals)
            batches.append(batch)
            sums["tokens"] += int(batch.attention_BT.sum())
            _add(sums, batch.counts(self.job.cfg.objective.tokens)._asdict())
        totals = self._all_reduce(sums)
        tokens = totals.pop("tokens")
        counts = TokenCounts(**totals)
        terms: dict[str, float] = {}
        for batch in batches:
            loss: Loss = self.engine(batch, counts)
            self.engine.backward(loss.total)
            # DeepSpeed counts the calls, and updates parameters with a step's last micro-batch.
            self.engine.step(rate)
            _add(terms, {name: term.detach() for name, term in loss._asdict().items()})
        means = self._all_reduce(terms)
        self.tokens += int(tokens)
        return {"loss": means.pop("total"), **means, "tokens": tokens}

    def _watched(self) -> list[UnlearnBatch]:
        """Return this worker's share of the rows by which steps may end early, if any may."""
        module = self.module
        if not isinstance(module, ResidualAlignment) or module.objective.stop_at is None:
            return []
        batches = -(-STOP_ROWS // self.job.cfg.train.forget_batch_size)
        return [self._batch([], rows) for rows in self.rows.once("forget", batches)]

    def _may_stop(self, watched: list[UnlearnBatch]) -> bool:
        """Return whether enough is forgotten; all workers decide the same."""
        if not watched:
            return False
        assert isinstance(self.module, ResidualAlignment)
        return has_forgotten(self.module, watched, self._all_reduce)

    def _batch(
        self, retain: list[Row], forget: list[Row], refusals: Sequence[Row] = ()
    ) -> UnlearnBatch:
        return self.rows.collate(retain, forget, refusals).to(self.engine.device)

    def _all_reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the totals over workers, by name, on every worker."""
        # fp32 cannot count more than 2^24 tokens.
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(tensor)
        return dict(zip(values, tensor.tolist(), strict=True))

    def _sampled_batches(self, start: int = 0) -> Iterator[tuple[UnlearnBatch, int]]:
        """Yield retain and utility batches, with the features a row to sample for clusters."""
        number = self.job.batches["retain"]
        for batch in self.rows.retain_batches(start=start):
            sample_tokens = sampled_tokens(self.job.cfg, self.sampled_rows, number)
            if sample_tokens:
                is_retain_B = batch.attention_BT.any(1) & batch.retain_B
                rows = self._all_reduce({"rows": float(is_retain_B.sum())})["rows"]
                self.sampled_rows += int(rows)
            yield batch.to(self.engine.device), sample_tokens

    def _fit_targets(self, module: ResidualAlignment) -> None:
        """Fit the targets to the base features of the first retain rows of all workers."""
        totals = {name: FeatureSums() for name in module.hooks.names}
        self.sampled_rows = 0
        for batch, sample_tokens in self._sampled_batches():
            if not sample_tokens:
                break
            for name, sums in module.feature_sums(batch, sample_tokens).items():
                totals[name].merge(sums)
        module.fit(exchange.merged_features(totals))

    def _small_set(self, name: str) -> list[UnlearnBatch]:
        """Return this worker's rows of the forget or holdout set, in one batch where they fit.

        The total decides, so that every worker has the same number of batches. Mode `per_token`
        also goes backward through them, which takes the memory of a gradient step: its batches
        stay as small as a step's.
        """
        batches = list(self.rows.once(name))
        joined = [row for rows in batches for row in rows]
        tokens = self._all_reduce({"tokens": sum(row.size for row in joined)})["tokens"]
        fits = tokens <= TOKENS_AT_ONCE * self.world_size
        if fits and self.job.stage < 3 and self.job.cfg.solve.mode != "per_token":
            batches = [joined]
        return [self._batch([], rows) for rows in batches]

    def _solve_from(
        self, checkpoint: Checkpoint | None, module: ResidualAlignment
    ) -> Checkpoint | None:
        """Solve, unless a resume point holds the solution; return the point to train on from."""
        if self.job.cfg.solve.mode == "off":
            return checkpoint
        statistics = read_statistics(checkpoint)
        if checkpoint is not None and statistics is None:
            return checkpoint
        self._solve(module, checkpoint, statistics)
        return None

    def _solve(
        self,
        module: ResidualAlignment,
        checkpoint: Checkpoint | None,
        statistics: StatisticsPoint | None,
    ) -> None:
        """Find the adapter in closed form, and save a resume point if training follows.

        The statistics go on from those of a resume point.
        """
        started = time.monotonic()

        def send_progress(done: int, total: int, what: str) -> None:
            if self.rank == 0:
                self.job.messages.put({"done": done, "of": total, "what": what})

        solver = WorkerSolver(self.job.cfg.solve, module, self._write_adapter, send_progress)
        start = 0
        if checkpoint is not None and statistics is not None:
            add_statistics(
                checkpoint, statistics.files, solver.one_pass, self.rank, self.world_size
            )
            start, self.sampled_rows = statistics.batches, statistics.rows
            started -= statistics.seconds
            if self.rank == 0:  # its tokens are those of all
                solver.tokens = statistics.tokens
        self._collect(solver, start, started)
        trials = solver.solve(self._small_set("forget"), self._small_set("holdout"))
        self.trials = [trial._asdict() for trial in trials]
        self.tokens = int(self._all_reduce({"tokens": solver.tokens})["tokens"])
        self.seconds = self.solve_s = time.monotonic() - started
        if self.job.steps > 0:
            self._report(0, final=False)

    def _collect(self, solver: WorkerSolver, start: int, started: float) -> None:
        """Collect the solver's statistics from a batch on, and save resume points on the way."""
        number, every = self.job.batches["retain"], self.job.cfg.solve.checkpoint_every
        for read in solver.collect(self._sampled_batches(start)):
            done = start + read
            solver.on_progress(done, number, "statistics")
            if every is None or done % every or done == number:
                continue
            tokens = int(self._all_reduce({"tokens": solver.tokens})["tokens"])
            seconds = time.monotonic() - started
            point = StatisticsPoint(done, self.sampled_rows, tokens, seconds, self.world_size)
            report_statistics(
                point, solver.one_pass, self.rank, self.pruned.norms, self.job.cfg.output_dir
            )

    def _write_adapter(self, name: str, a_KD: Tensor, b_OK: Tensor) -> None:
        """Write a solution into a module's adapter; pruned outputs stay zero where configured."""
        # Masks name the base model's weights, without the prefix that PEFT adds.
        kept_O = self.pruned.kept_rows.get(name.removeprefix("base_model.model.") + ".weight")
        if kept_O is not None and self.job.cfg.prune.keep_sparsity:
            b_OK = b_OK.clone()
            b_OK[~kept_O] = 0
        values = {
            f"model.{name}.lora_A.{ADAPTER}.weight": a_KD,
            f"model.{name}.lora_B.{ADAPTER}.weight": b_OK,
        }
        self.engine.place(values)

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
            "num_workers": self.world_size,
        }
        if self.rank > 0:
            ray.train.report(progress, checkpoint=None)
            return
        moments: dict[str, Tensor] | None = None
        if with_moments:
            moments = {**state.moments, "rng": torch.get_rng_state()}
        point = ResumePoint(progress, state.parameters, moments, self.pruned.norms)
        report_point(point, self.job.cfg.output_dir)


def _add(totals: dict[str, float], values: Mapping[str, Any]) -> None:
    """Add numbers or scalar tensors to totals of the same names."""
    for name, value in values.items():
        totals[name] = totals.get(name, 0.0) + float(value)
