"""Bugs in real code: faults injected into pure-Python packages, kept if the package's own tests notice them.

`package.py` fetches and inspects, `mutate.py` and `hunks.py` make faults, `bench.py` runs tests in a sandbox, `find.py`
decides what is kept, `issue.py` writes the issue, `export.py` writes tasks, `generate.py` does all packages.
"""

from agentkit_evals.synth.bugs.export import FORMATS, Format
from agentkit_evals.synth.bugs.generate import Progress, make_bugs
from agentkit_evals.synth.bugs.package import PackageSpec

__all__ = ["FORMATS", "Format", "PackageSpec", "Progress", "make_bugs"]
