"""Bugs in real code: faults injected into pure-Python packages, kept if the package's own tests notice them.

`package.py` fetches and inspects, `mutate.py` and `hunks.py` make faults, `sandbox.py` runs tests, `find.py` decides
what is kept, `issue.py` writes the issue, `export.py` writes tasks, `generate.py` does all packages.
"""

from agentkit_evals.synth.bugs.export import EXPORT_FORMATS, ExportFormat
from agentkit_evals.synth.bugs.generate import PackageProgress, make_bugs
from agentkit_evals.synth.bugs.package import PackageSpec

__all__ = ["EXPORT_FORMATS", "ExportFormat", "PackageProgress", "PackageSpec", "make_bugs"]
