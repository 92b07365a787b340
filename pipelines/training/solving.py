"""The closed form on a worker: statistics, which resume, and then the adapter."""

import time
from typing import NamedTuple

from ray.train import Checkpoint

from pipelines.training.statistics_point import (
    StatisticsPoint,
    add_statistics,
    read_statistics,
    report_statistics,
)
from pipelines.training.strength import WorkerSolver
from pipelines.training.worker import Worker
from rfa.aims import MARGIN
from rfa.batch import UnlearnBatch
from rfa.objective import ResidualAlignment

# A small set of up to this many tokens a worker is one batch: the solver then needs one forward.
TOKENS_AT_ONCE = 16384


class Solved(NamedTuple):
    """What a solve cost, and the strengths that were tried, the chosen one last."""

    seconds: float
    tokens: int
    trials: list[dict[str, float]]


class Solving:
    """Solve a worker's adapters in closed form, in step with the other workers."""

    def __init__(self, worker: Worker) -> None:
        module = worker.module
        assert isinstance(module, ResidualAlignment)
        self.worker = worker
        self.started = time.monotonic()
        self.solver = WorkerSolver(
            worker.job.cfg.solve, module, worker.write_adapter, self._send_progress
        )

    def run(self, checkpoint: Checkpoint | None) -> Solved:
        """Find the adapter; the statistics go on from those of a resume point."""
        if checkpoint is None and self.worker.job.prepared is not None:
            self._take_prepared(self.worker.job.prepared)
        self._collect(checkpoint)
        self.solver.one_pass.reduce()
        trials = self.solver.solve(self._small_set("forget"), self._small_set("holdout"))
        if self.solver.standings and self.worker.rank == 0:
            first, last = self.solver.standings[0], self.solver.standings[-1]
            self.worker.job.messages.put(
                {"away": last.away, "pushed": first.away, "margin": MARGIN}
            )
        tokens = self._tokens()
        seconds = time.monotonic() - self.started
        return Solved(seconds, tokens, [trial._asdict() for trial in trials])

    def prepare(self, checkpoint: Checkpoint | None) -> None:
        """Collect the statistics alone; they are the last resume point."""
        self._collect(checkpoint)
        self._report(self.worker.job.batches["retain"])

    def _take_prepared(self, prepared: Checkpoint) -> None:
        """Begin with the statistics of all rows that the model was trained on, less the forget's."""
        worker, one_pass = self.worker, self.solver.one_pass
        point = read_statistics(prepared)
        assert point is not None, "the preflight has found prepared statistics"
        for rows in worker.rows.once("removed"):
            batch = worker.batch(rows, [])
            one_pass.collect(batch, 0)
            self.solver.tokens += int(batch.attention_BT.sum())
        # They come first, with the other sign, so that no second copy of the sums is needed.
        for of_kind in one_pass.sums.values():
            for sums in of_kind.values():
                sums.negate_()
        add_statistics(prepared, point.files, one_pass, worker.rank, worker.world_size)

    def _collect(self, checkpoint: Checkpoint | None) -> None:
        """Collect the retained sets' statistics, and save resume points on the way."""
        worker = self.worker
        number, every = worker.job.batches.get("retain", 0), worker.job.cfg.solve.checkpoint_every
        start = self._resume(checkpoint)
        for read in self.solver.collect(worker.sampled_batches(start)):
            done = start + read
            self._send_progress(done, number, "statistics")
            if every is not None and done % every == 0 and done < number:
                self._report(done)

    def _resume(self, checkpoint: Checkpoint | None) -> int:
        """Add what a resume point has counted, and return the batch to go on with."""
        worker, point = self.worker, read_statistics(checkpoint)
        if checkpoint is None or point is None:
            return 0
        add_statistics(
            checkpoint, point.files, self.solver.one_pass, worker.rank, worker.world_size
        )
        worker.sampled_rows = point.rows
        self.started -= point.seconds
        if worker.rank == 0:  # its tokens are those of all
            self.solver.tokens = point.tokens
        return point.batches

    def _report(self, done: int) -> None:
        """Report the statistics of so many batches as a resume point."""
        worker = self.worker
        seconds = time.monotonic() - self.started
        point = StatisticsPoint(
            done, worker.sampled_rows, self._tokens(), seconds, worker.world_size
        )
        report_statistics(
            point,
            self.solver.one_pass,
            worker.rank,
            worker.pruned.norms,
            worker.job.cfg.output_dir,
        )

    def _tokens(self) -> int:
        """Return the tokens that all workers have read of the retained sets."""
        return int(self.worker.all_reduce({"tokens": self.solver.tokens})["tokens"])

    def _small_set(self, name: str) -> list[UnlearnBatch]:
        """Return this worker's rows of the forget or holdout set, in one batch where they fit.

        The total decides, so that every worker has the same number of batches. Mode `per_token`
        also goes backward through them, which takes the memory of a gradient step: its batches
        stay as small as a step's.
        """
        worker = self.worker
        batches = list(worker.rows.once(name))
        joined = [row for rows in batches for row in rows]
        tokens = worker.all_reduce({"tokens": sum(row.size for row in joined)})["tokens"]
        fits = tokens <= TOKENS_AT_ONCE * worker.world_size
        if fits and worker.job.stage < 3 and worker.job.cfg.solve.mode != "per_token":
            batches = [joined]
        return [worker.batch([], rows) for rows in batches]

    def _send_progress(self, done: int, total: int, what: str) -> None:
        if self.worker.rank == 0:
            self.worker.job.messages.put({"done": done, "of": total, "what": what})
