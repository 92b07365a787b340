"""What a worker measures of a row under a classifier: loss, whether it is right, and what oracles are compared by.

Shapes: B rows, S places, D features, C classes.
"""

from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.encoding.labelled import ClassEncoder
from pipelines.model.load import load_base
from rfa.batch import UnlearnBatch, collate
from rfa.features import BlockRunner, as_positions

COLUMNS = ("set", "row", "answer", "label", "image")
COMPARED = "forget"  # the set whose outputs and features are compared with the oracle's


class ClassScorer:
    """Scores rows under one classifier after another, holding one at a time."""

    def __init__(self, cfg: UnlearnConfig, models: dict[str, ModelConfig]) -> None:
        self.cfg, self.models = cfg, models
        self.device = "cuda" if cfg.train.gpus_per_worker else "cpu"
        if self.device == "cpu":
            torch.set_num_threads(max(1, int(cfg.train.cpus_per_worker)))
        self._encoder = ClassEncoder(
            cfg.model, cfg.data.max_tokens, reads_images=cfg.task == "image_classification"
        )
        self._loaded: tuple[str, PreTrainedModel, BlockRunner] | None = None

    @torch.inference_mode()
    def score(self, name: str, rows: pa.Table) -> list[tuple[str, int, dict[str, Any]]]:
        """Set, row number and numbers of each row, under the model of that name."""
        runner = self._load(name)
        columns = {key: rows[key].to_numpy(zero_copy_only=False) for key in COLUMNS}
        encoded = self._encoder.encode_batch(columns)
        records = [
            dict(zip(encoded, own, strict=True)) for own in zip(*encoded.values(), strict=True)
        ]
        found: list[tuple[str, int, dict[str, Any]]] = []
        for start in range(0, len(records), self.cfg.evaluation.batch_size):
            own = records[start : start + self.cfg.evaluation.batch_size]
            batch = collate(self._encoder.rows(own), [], self._encoder.pad_token_id).to(self.device)
            fields = _numbers(runner, batch, own)
            found += [
                (str(r["set"]), int(r["row"]), numbers)
                for r, numbers in zip(own, fields, strict=True)
            ]
        return found

    def _load(self, name: str) -> BlockRunner:
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # the old model goes before the new one comes
            model = load_base(
                self.models[name], self.cfg.train.precision, task=self.cfg.task
            ).eval()
            model.to(self.device)  # pyright: ignore[reportArgumentType]
            self._loaded = name, model, BlockRunner(model)
        return self._loaded[2]


def _numbers(
    runner: BlockRunner, batch: UnlearnBatch, records: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    out = runner(batch, logits_at_BT=batch.answer_BT)
    assert out.logits_NV is not None
    log_BC = out.logits_NV.double().log_softmax(-1)
    loss_B = -log_BC.gather(1, batch.label_B[:, None])[:, 0]
    right_B = log_BC.argmax(-1) == batch.label_B
    feature_BD = _pooled(batch, as_positions(out.hidden_BTD).double())
    fields: list[dict[str, Any]] = [
        {"set_name": str(record["set"]), "loss": loss, "accuracy": float(right)}
        for record, loss, right in zip(records, loss_B.tolist(), right_B.tolist(), strict=True)
    ]
    for index, record in enumerate(records):
        if record["set"] == COMPARED:
            fields[index] |= {
                "probabilities": tuple(log_BC[index].exp().tolist()),
                "feature": tuple(feature_BD[index].tolist()),
            }
    return fields


def _pooled(batch: UnlearnBatch, feature_BSD: Tensor) -> Tensor:
    """Mean over a row's places: of the last block's output."""
    places = batch.places(feature_BSD, batch.attention_BT)
    pooled_BD = torch.zeros_like(feature_BSD[:, 0])
    return pooled_BD.index_add_(0, places.index_N, places.feature_ND * places.weight_N[:, None])
