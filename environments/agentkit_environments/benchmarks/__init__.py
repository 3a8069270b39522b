"""Benchmarks of opening an environment and running a command in it."""
