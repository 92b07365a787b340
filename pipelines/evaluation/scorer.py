"""What scorers of texts and of classes share: one model at a time, on a worker's device.

Rows come in, numbers go out: a `Sample` holds no text.
"""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel

from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.evaluation.attacks import quantise_blocks_
from pipelines.evaluation.metrics import Sample
from pipelines.evaluation.metrics.keys import InContext, Rounding
from pipelines.evaluation.scored_model import Beside, Relearned, ScoredModel, is_oracle
from pipelines.model.load import load_base
from rfa.blocks import BlockRunner

# Rows of one person are often numbered behind the person's name.
ID_BEGINNING = re.compile(r"(.+)[-_:/]", re.DOTALL)
Samples = dict[tuple[str, int], Sample]  # by set and row number


class Scorer(ABC):
    """Scores rows under one model after another, holding one at a time.

    `on_step` is called with 1 after each step of a relearning.
    """

    def __init__(
        self,
        cfg: UnlearnConfig,
        models: Mapping[str, ModelConfig],
        on_step: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.cfg, self.models, self.on_step = cfg, models, on_step
        self.device = "cuda" if cfg.train.gpus_per_worker else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(cfg.train.cpus_per_worker)))
        self._loaded: tuple[ScoredModel, BlockRunner] | None = None
        self._reference: BlockRunner | None = None  # what the loaded model is compared with

    def hold(self, model: ScoredModel, network: PreTrainedModel) -> None:
        """Take a model that is in memory, to score it as it stands whenever rows come."""
        self._loaded = model, BlockRunner(network)

    def score(self, model: ScoredModel, rows: pa.Table) -> Samples:
        """Return the numbers of each row under a model."""
        self.load(model)
        with torch.inference_mode():
            if isinstance(model.change, Beside):
                return self._compare(rows)
            if isinstance(model.change, InContext):
                return self._score_in_context(rows)
            return self._score(rows)

    def _compare(self, rows: pa.Table) -> Samples:
        """Return each row's distances between the loaded model and its reference."""
        raise NotImplementedError("only language models are compared token by token")

    def _score_in_context(self, rows: pa.Table) -> Samples:
        """Return the numbers of the forget rows among these, each asked behind the others."""
        raise NotImplementedError("only language models are shown examples")

    @abstractmethod
    def _score(self, rows: pa.Table) -> Samples:
        """Return the numbers of each row under the loaded model."""

    def relearn(self, model: ScoredModel, rows: pa.Table) -> dict[ScoredModel, Samples]:
        """Return the numbers of forget rows after each of STEPS of relearning other rows."""
        raise NotImplementedError("only language models are relearned")

    def answers(self, name: str, prompts: Sequence[str]) -> list[str]:
        """Return the model's greedy answer to each prompt."""
        raise NotImplementedError("only language models answer")

    @property
    def runner(self) -> BlockRunner:
        """The loaded model."""
        assert self._loaded is not None, "rows are scored under a model that is loaded"
        return self._loaded[1]

    @property
    def reference(self) -> BlockRunner:
        """The model that the loaded one is compared with."""
        assert self._reference is not None, "a model is loaded beside another to be compared"
        return self._reference

    def load(self, model: ScoredModel) -> None:
        """Load a model and make its change, unless it is the one that is held."""
        if self._loaded is not None and self._loaded[0] == model:
            return
        self._loaded = self._reference = None  # frees old models before new ones take memory
        # The small steps of relearning would be lost in bf16's 8 bits.
        relearns = isinstance(model.change, Relearned)
        network = self._network(model.name, "fp32" if relearns else self.cfg.train.precision)
        if isinstance(model.change, Rounding):
            quantise_blocks_(network, model.change)
        if isinstance(model.change, Beside):
            reference = self._network(model.change.reference, self.cfg.train.precision)
            self._reference = BlockRunner(reference)
        self._loaded = model, BlockRunner(network)

    def _network(self, name: str, precision: str) -> PreTrainedModel:
        """Load a model of the configuration onto this worker's devices."""
        task = self.cfg.task
        # A worker with several GPUs has them for a model that one of them cannot hold.
        spread = task == "causal_lm" and self.device == "cuda" and torch.cuda.device_count() > 1
        key = "evaluation.oracle" if is_oracle(name) else "model.path"
        model = self.models[name]
        network = load_base(model, precision, task=task, spread=spread, key=key).eval()
        if not spread:
            network.to(self.device)  # pyright: ignore[reportArgumentType]
        return network


def samples_of(
    records: Iterable[Mapping[str, Any]], numbers: Iterable[Mapping[str, Any]]
) -> Samples:
    """Return the numbers of each record as its sample."""
    samples: Samples = {}
    for record, fields in zip(records, numbers, strict=True):
        key = str(record["set"]), int(record["row"])
        samples[key] = Sample(set_name=key[0], **fields)
        group = group_of(record.get("label", ""), record.get("id") or "")
        if group is not None:
            samples[key]["group"] = group
    return samples


def group_of(label: str | int, row_id: str) -> int | None:
    """Return a number for a row's group: its class, or a checksum, so that no text leaves a worker.

    The checksum is that of its label. A row without one belongs to those whose ids are the same up
    to their last separator, and to none where its id has no separator.
    """
    if not isinstance(label, str):
        return int(label)
    shared = ID_BEGINNING.match(row_id)
    words = label or (shared[1] if shared else "")
    return zlib.crc32(words.encode()) if words else None
