"""A training step by formula, for a model that cannot run without values.

The formula counts what every layer of a block sees and says. A trace is nearer to the truth.
"""

from typing import Any, NamedTuple

from peft import PeftModel
from torch import nn

from pipelines.config.schema import UnlearnConfig
from pipelines.model.load import DTYPES, image_shape
from rfa.adapters import fused_weights, lora_layers, output_width
from rfa.blocks import find_blocks

FP32_BYTES = 4
PATCH = 16  # the side of an image's patch that counts as a token, as in ViT
# Norms, activations and residual connections keep about as much as the layers between them.
BESIDE_LAYERS = 2
# Logits in fp32, their log-softmax, and its gradient.
COPIES_OF_LOGITS = 3
# A module's features, what its adapter adds, and the loss's fp32 copies of both.
COPIES_OF_FEATURES = 4


class Block(NamedTuple):
    """The weights that a token meets in the blocks, and the features that their layers see and say.

    `widest` are the features of one block, the one that has most.
    """

    weights: int
    features: int
    widest: int
    depth: int


def estimate(cfg: UnlearnConfig, model: PeftModel, shape: Any) -> tuple[int, float]:
    """Return bytes and floating-point operations of a micro-batch of a `StepShape`.

    It is rather too much than too little.
    """
    rows = shape.retain + shape.forget
    positions = cfg.data.max_tokens
    if cfg.task == "image_classification":
        _, height, width = image_shape(model.config)
        positions = -(-height // PATCH) * -(-width // PATCH) + 1
    blocks = _blocks(model)
    size = DTYPES[cfg.train.precision].itemsize
    tokens = rows * positions
    held = blocks.widest
    if shape.backward:
        # Recomputation keeps a block's input and the features of the block that is recomputed.
        inputs = blocks.depth * getattr(model.config.get_text_config(), "hidden_size", 0)
        held = inputs + blocks.widest if shape.checkpointing else blocks.features
    memory = size * BESIDE_LAYERS * tokens * held
    memory += size * _scores(model, rows, positions, blocks.depth if shape.backward else 1)
    adapted = sum(output_width(layer) for _, layer in lora_layers(model))
    memory += COPIES_OF_FEATURES * FP32_BYTES * tokens * adapted
    weights = cfg.objective.weights
    head = 0
    if shape.backward and (weights.task or weights.kl or weights.output):
        text = model.config.get_text_config()
        outputs = getattr(text, "vocab_size", 0) if cfg.task == "causal_lm" else 0
        memory += COPIES_OF_LOGITS * FP32_BYTES * tokens * outputs
        head = outputs * getattr(text, "hidden_size", 0)
    passes = 1
    if shape.backward:
        # The gradient of the features costs a forward more, and so do a teacher and recomputation.
        has_teacher = cfg.objective.settings().needs_teacher
        passes = 2 + has_teacher + shape.checkpointing
    return memory, 2.0 * passes * tokens * (blocks.weights + head)


def _blocks(model: PeftModel) -> Block:
    text: Any = model.config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    weights = 0
    features: list[int] = []
    for block in find_blocks(model)[1]:
        features.append(0)
        for module in block.modules():
            matrix = getattr(module, "weight", None)
            if isinstance(module, nn.Embedding) or matrix is None or matrix.ndim < 2:
                continue
            weights += matrix.numel()
            features[-1] += matrix.shape[0] + matrix[0].numel()
        for matrix in fused_weights(block).values():
            weights += chosen * matrix[0].numel()
            features[-1] += chosen * sum(matrix.shape[1:])
    return Block(weights, sum(features), max(features), len(features))


def _scores(model: PeftModel, rows: int, positions: int, depth: int) -> int:
    """Return the number of attention scores and their softmax, none with a fused kernel."""
    config: Any = model.config.get_text_config()
    if config._attn_implementation == "planned":
        return 0
    heads = getattr(config, "num_attention_heads", None) or 0
    return 2 * depth * rows * heads * positions**2
