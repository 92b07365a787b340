"""Ray Train: the trainer on the driver, and the loop on its workers."""
