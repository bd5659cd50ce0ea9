"""The parts of tests/benchmark.py, each file with one purpose."""
