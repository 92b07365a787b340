"""The flow: Ray Data, training by Ray Train and DeepSpeed, proof by evaluation and MLflow."""
