"""Arrays from stage to stage, and sums over replicas, in one process and between processes."""
