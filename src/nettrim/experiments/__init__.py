"""Data sets, small networks and their training, for the demo, the benchmarks and the published experiments.

Nothing in the library's core imports this package: pruning needs a trained network and calibration batches, wherever they come from.
"""
