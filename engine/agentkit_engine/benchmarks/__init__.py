"""Speed and exactness of the engine beside its peers: `python -m agentkit_engine.benchmarks`.

`registry.py` lists the benchmarks. `peers.py` runs the peer libraries in the same process with the same weights.
`null_model.py` replaces the model where only the code around it is measured. `record.py` defines a result and its file.
`command.py` is the command line that all rooms share. `timing.py` and `cold_start.py` measure time.
`floor.py` measures the matrix products in a step alone.
"""
