"""``gn-det check``: find problems in a dataset before training. Import the modules directly."""
