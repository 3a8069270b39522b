"""How fast and how exact the engine is, next to its peers: `python -m agentkit_engine.benchmarks`.

`registry.py` says what is measured, `peers.py` brings the competition into the same process with the same weights,
`null_model.py` takes the model out where all else is measured, `record.py` says what a result is and where it is kept,
`command.py` is what all rooms' benchmarks share, `timing.py` and `cold_start.py` hold the clocks.
"""
