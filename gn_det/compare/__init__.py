"""Comparisons: a suite of rows is run, measured over seeds, and reported beside what others published."""
