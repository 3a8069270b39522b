"""The public names of the package."""

from __future__ import annotations

import agentkit


def test_every_public_name_can_be_imported() -> None:
    assert [name for name in agentkit.__all__ if not hasattr(agentkit, name)] == []
