"""What takes finished artifacts and jobs to a cluster. Nothing here yet."""
