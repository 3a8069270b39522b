"""What the loop costs and what it saves: `python -m agentkit.benchmarks`.

`registry.py` says what is measured, `steered.py` is a model that computes every token and says what a script says. The
frame (records, clocks, the command) is `agentkit_engine.benchmarks`.
"""
