"""``gn-det check``: what is wrong with a dataset, before a run finds out. Import the modules directly."""
