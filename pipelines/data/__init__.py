"""Sources, rows and the sets of an unlearning problem."""
