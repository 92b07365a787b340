"""From rows to tokens or pixels, and to the batches of a step."""
