"""A worker of a run: its model and rows, and its exchange of numbers with the others."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from pipelines.model.engine import Engine
from pipelines.training.build import Pruned
from pipelines.training.job import Job
from pipelines.training.worker_rows import WorkerRows, sampled_tokens
from rfa.adapters import ADAPTER
from rfa.batch import Row, UnlearnBatch


class Worker:
    """What solving and training have in common on one worker.

    Attributes:
        rank: this worker's number, and `world_size` how many there are.
        sampled_rows: rows of the retain set that have been sampled for the targets' clusters.
    """

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
        self.sampled_rows = 0

    def batch(
        self, retain: list[Row], forget: list[Row], refusals: Sequence[Row] = ()
    ) -> UnlearnBatch:
        """Return rows as a batch on this worker's device."""
        return self.rows.collate(retain, forget, refusals).to(self.engine.device)

    def all_reduce(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the totals over workers, by name, on every worker."""
        # fp32 cannot count more than 2^24 tokens.
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(tensor)
        return dict(zip(values, tensor.tolist(), strict=True))

    def sampled_batches(self, start: int = 0) -> Iterator[tuple[UnlearnBatch, int]]:
        """Yield the retained sets' batches, with the features a row to sample for clusters."""
        number = self.job.batches.get("retain", 0)
        for batch in self.rows.retain_batches(start=start):
            sample_tokens = sampled_tokens(self.job.cfg, self.sampled_rows, number)
            if sample_tokens:
                is_retain_B = batch.attention_BT.any(1) & batch.retain_B
                rows = self.all_reduce({"rows": float(is_retain_B.sum())})["rows"]
                self.sampled_rows += int(rows)
            yield batch.to(self.engine.device), sample_tokens

    def write_adapter(self, name: str, a_KD: Tensor, b_OK: Tensor) -> None:
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
