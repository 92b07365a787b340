"""The flow: data through Ray Data, training through Ray Train and DeepSpeed, proof through evaluation and MLflow."""
