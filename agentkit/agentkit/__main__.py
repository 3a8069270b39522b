"""Entry point of `python -m agentkit`, which is the command `agentkit`."""

from agentkit.cli import main

if __name__ == "__main__":
    main()
