"""Ray tasks, nodes and resources."""
