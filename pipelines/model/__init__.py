"""Models on a worker: loading, DeepSpeed, pruning, training on answers."""
