"""Plans: a run compiled for chips that aren't there; what it takes, what bounds it, its costs."""
