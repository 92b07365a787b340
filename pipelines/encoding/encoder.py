"""The encoder of a task, which turns the rows of a set into the inputs of the model.

Both encoders can be pickled. `encode_batch` runs in Ray Data's tasks and drops all text. `rows`
runs on the workers of the training and returns `rfa.batch.Row`s. `blank` is the row of a worker
whose share of a small set is empty.
"""

from pipelines.config.schema import UnlearnConfig
from pipelines.encoding.labelled import ClassEncoder
from pipelines.encoding.text import TextEncoder

Encoder = TextEncoder | ClassEncoder


def build_encoder(cfg: UnlearnConfig) -> Encoder:
    """Return the encoder of the configured task."""
    if cfg.task == "causal_lm":
        return TextEncoder(cfg.model, cfg.data.system_prompt, cfg.data.max_tokens)
    reads_images = cfg.task == "image_classification"
    return ClassEncoder(cfg.model, cfg.data.max_tokens, reads_images=reads_images)
