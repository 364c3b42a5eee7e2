"""What a run tells the world: records, event files, progress, throughput, plots."""
