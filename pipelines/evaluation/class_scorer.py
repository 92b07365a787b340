"""Score rows under a classifier: loss, accuracy, and what is compared with the oracle's outputs.

Shapes: B rows, S positions, N selected positions, D features, C classes.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch

from pipelines.config.schema import ModelConfig, UnlearnConfig
from pipelines.encoding.labelled import ClassEncoder
from pipelines.evaluation.scorer import Samples, Scorer, samples_of
from rfa.batch import collate
from rfa.features import as_positions

COLUMNS = ("set", "row", "answer", "label", "image")
COMPARED = "forget"  # the set whose outputs and features are compared with the oracle's


class ClassScorer(Scorer):
    """Scores rows that have a class."""

    def __init__(self, cfg: UnlearnConfig, models: Mapping[str, ModelConfig]) -> None:
        super().__init__(cfg, models)
        reads_images = cfg.task == "image_classification"
        self._encoder = ClassEncoder(cfg.model, cfg.data.max_tokens, reads_images=reads_images)

    def _score(self, rows: pa.Table) -> Samples:
        columns = {key: rows[key].to_numpy(zero_copy_only=False) for key in COLUMNS}
        encoded = self._encoder.encode_batch(columns)
        # Not through Arrow, which would copy each image.
        records = [
            dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True)
        ]
        size = self.cfg.evaluation.batch_size
        numbers: list[dict[str, Any]] = []
        for start in range(0, len(records), size):
            part = records[start : start + size]
            batch = collate(self._encoder.rows(part), [], self._encoder.pad_token_id)
            batch = batch.to(self.device)
            out = self.runner(batch, logits_at_BT=batch.answer_BT)
            assert out.logits_NV is not None
            log_BC = out.logits_NV.double().log_softmax(-1)
            loss_B = -log_BC.gather(1, batch.label_B[:, None])[:, 0]
            is_right_B = log_BC.argmax(-1) == batch.label_B
            feature_BSD = as_positions(out.hidden_BTD).double()
            selected = batch.select(feature_BSD, batch.attention_BT)
            # The weights of a row's positions sum to 1, so this is their mean. Padding has none.
            feature_BD = torch.zeros_like(feature_BSD[:, 0]).index_add_(
                0, selected.index_N, selected.feature_ND * selected.weight_N[:, None]
            )
            for index, record in enumerate(part):
                row: dict[str, Any] = {"loss": float(loss_B[index])}
                row["accuracy"] = float(is_right_B[index])
                if record["set"] == COMPARED:
                    row["probabilities"] = tuple(log_BC[index].exp().tolist())
                    row["feature"] = tuple(feature_BD[index].tolist())
                numbers.append(row)
        return samples_of(records, numbers)
