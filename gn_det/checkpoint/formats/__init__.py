"""How the tensors of other projects are named and arranged, one module a project."""
