"""Take finished runs and jobs to a cluster."""
