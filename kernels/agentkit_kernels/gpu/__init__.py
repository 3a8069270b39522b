"""Correctness and speed of the Triton kernels on a GPU: `python -m agentkit_kernels.gpu`.

A part is a set of measurements that ends within four minutes and writes one JSON file. Each runs in a process of its
own, since a fault on a GPU ends the process. `--rehearse` runs the same code on a CPU, in Triton's interpreter, with
toy shapes: it checks that the code runs, and its times mean nothing.

Only torch, triton and numpy are needed. Random data is made on the device.

| file | content |
|---|---|
| `parts.py` | the parts, and which goals they measure |
| `command.py` | the command line, and the processes of the parts |
| `bench.py` | the device: random data, clocks, floors, comparisons |
| `record.py` | a part's JSON file, and the table |
| `correctness.py` | every kernel against its twin |
| `catalogue.py` | every kernel's time beside its floor |
| the others | one operation each beside what torch offers |
"""
