"""Comparisons: run a suite of rows, measure over seeds, and report beside published results."""
