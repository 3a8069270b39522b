"""The version of agentkit."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def agentkit_version() -> str:
    """Return the installed version, or "unknown" in a checkout that was never installed."""
    try:
        return version("agentkit-harness")
    except PackageNotFoundError:
        return "unknown"
