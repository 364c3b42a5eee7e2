"""Learning-rate schedules and optimizers, as optax transformations."""
