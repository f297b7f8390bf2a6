"""Tensor names and layouts of other projects, one module per project."""
