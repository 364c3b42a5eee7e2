"""Plans: a run compiled for chips that are not there; what it takes, what bounds it, what it costs."""
