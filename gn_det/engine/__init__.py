"""A run, whichever engine trains: data, schedule, checkpoints, evaluation, processes. Needs neither engine."""
