"""The rows of one worker: its shares of the streams, batch by batch."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import ray.train

from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.batches import batches_of
from pipelines.encoding.encoder import Encoder
from pipelines.training.job import Job
from rfa.batch import Row, UnlearnBatch, collate
from rfa.targets import SAMPLE_TOKENS


class StepRows(NamedTuple):
    """This worker's rows of one step."""

    retain: list[Row]
    forget: list[Row]


class WorkerRows:
    """Read this worker's shares of the streams `retain`, `forget` and `holdout`.

    Batches are on the CPU. Every worker gets the same number of them, because a step's collective
    operations need all workers. A worker whose share of a batch is empty gets a blank row.
    """

    def __init__(self, job: Job, encoder: Encoder) -> None:
        self.job = job
        self.encoder = encoder
        self._blank: Row | None = None

    def of(self, name: str, start: int = 0) -> Iterator[list[Row]]:
        """Yield the rows of a stream without end, from batch `start` on."""
        stream = ray.train.get_dataset_shard(name)
        assert stream is not None
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        for records in batches_of(stream, self.job.batches[name], rank, world_size, start):
            yield self.encoder.rows(records)

    def once(self, name: str, limit: int | None = None, start: int = 0) -> Iterator[list[Row]]:
        """Yield each row of a stream once, in batches `start` to `limit`; none of a missing stream."""
        number = self.job.batches.get(name, 0)
        if limit is not None:
            number = min(limit, number)
        if start < number:
            yield from islice(self.of(name, start), number - start)

    def retain_batches(self, limit: int | None = None, start: int = 0) -> Iterator[UnlearnBatch]:
        """Yield the retain and utility rows once, in batches `start` to `limit`."""
        for rows in self.once("retain", limit, start):
            yield self.collate(rows, [])

    def steps(self, start: int) -> Iterator[StepRows]:
        """Yield the rows of each step without end, from step `start` on.

        Forget rows are read only where the objective has a term over them.
        """
        objective = self.job.cfg.objective.settings()
        reads_forget = self.job.kind == "finetune" or objective.reads_forget_set
        # Ray Data does not restore an iterator's position, so a resumed run begins to read at its
        # step (`batches_of` skips to it).
        retain = self.of("retain", start)
        forget: Iterator[list[Row]] | None = None
        if reads_forget and "forget" in self.job.batches:
            forget = self.of("forget", start)
        while True:
            yield StepRows(next(retain), [] if forget is None else next(forget))

    def collate(
        self, retain: list[Row], forget: list[Row], refusals: Sequence[Row] = ()
    ) -> UnlearnBatch:
        """Pad rows to one batch; a blank row where there are none."""
        # A classifier's blank row reads a configuration or draws an image: only where it is needed.
        if self._blank is None and not retain and not forget:
            self._blank = self.encoder.blank()
        pad_token_id = self.encoder.pad_token_id
        return collate(retain, forget, pad_token_id, self._blank, refusals=refusals)


def sampled_tokens(cfg: UnlearnConfig, seen: int, batches: int) -> int:
    """Return the features a row to sample for the targets' clusters from the next batch.

    `seen` are the retain set's rows in the batches before it, of all `batches`: where the utility
    set is the larger one, few of them hold any. The result is 0 once `objective.target_rows` of
    them have been sampled.
    """
    limit = min(cfg.objective.target_rows, batches * cfg.train.retain_batch_size)
    if seen >= limit:
        return 0
    return max(1, SAMPLE_TOKENS // limit)
