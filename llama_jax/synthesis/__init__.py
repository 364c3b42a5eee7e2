"""Data made by models: answers sampled, scored, verified, the best kept; poor ones corrected."""
