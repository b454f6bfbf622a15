"""Solvers of one layer's program. They know tensors and programs, never modules."""
