"""Benchmarks of the agent loop: `python -m agentkit.benchmarks`.

`registry.py` lists the benchmarks. `steered.py` is a model that computes every token but has a scripted output.
Records, timing and the command come from `agentkit_engine.benchmarks`.
"""
