"""Where results lie: file systems, the output folder, the run's files and digests."""
