"""The training state, the jitted step, the one loop, and the wiring of a run."""
