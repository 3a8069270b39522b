"""`python -m agentkit_environments.images`: see `base.py`."""

from __future__ import annotations

from agentkit_environments.images.base import main

if __name__ == "__main__":
    main()
