"""What takes finished artifacts and jobs to a cluster."""
