"""The Docker sandbox: one container per environment, hardened beyond the engine's defaults.

environment.py  DockerEnvironment, the contract: every blocking call below runs in a worker thread
container.py    one container's life: keeper, scripts, "is it still there?", removal
hardening.py    what the container may do
exec_stream.py  one `docker exec` and its standard streams
files.py        files in and out through the engine's archive interface, never through programs of the image
killing.py      scripts that kill, in the image's /bin/sh, the one program of it that is needed
engine.py       the engine itself: connecting, images, removing and reaping containers
"""

from agentkit_environments.docker.engine import BUILD_HINT, docker_failure, reap_docker
from agentkit_environments.docker.environment import DockerEnvironment

__all__ = ["BUILD_HINT", "DockerEnvironment", "docker_failure", "reap_docker"]
