"""What importing the package costs."""

from __future__ import annotations

import subprocess
import sys


def test_importing_agentkit_imports_no_torch() -> None:
    code = "import sys, agentkit; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    import agentkit

    assert [name for name in agentkit.__all__ if not hasattr(agentkit, name)] == []
