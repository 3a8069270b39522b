"""Base image of the Docker backend, built by `python -m agentkit_environments.images`."""
