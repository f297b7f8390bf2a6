"""Runs, independent of the engine: data, schedule, checkpoints, evaluation, processes."""
