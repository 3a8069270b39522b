"""The base image of the Docker backend: `python -m agentkit_environments.images` makes it."""
