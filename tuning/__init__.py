"""Search over the flow: ranks, layers and loss weights."""
