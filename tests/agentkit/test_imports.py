"""The public face."""

from __future__ import annotations

import agentkit


def test_every_public_name_is_there() -> None:
    assert [name for name in agentkit.__all__ if not hasattr(agentkit, name)] == []
