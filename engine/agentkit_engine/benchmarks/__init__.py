"""How fast and how exact the engine is, next to its peers: `python -m agentkit_engine.benchmarks`.

`goals.py` measures, `peers.py` brings the competition into the same process with the same weights, `record.py` says
what a result is and where it is kept, `timing.py` and `cold_start.py` hold the clocks.
"""
