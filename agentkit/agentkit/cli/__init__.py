"""The `agentkit` command: each module holds one command, which parses, builds objects and calls one function.

Nothing heavy is imported here or at the top of a command's module, so `agentkit --help` starts without torch.
"""

from __future__ import annotations

from agentkit.cli.app import app, main

__all__ = ["app", "main"]
