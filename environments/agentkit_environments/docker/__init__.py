"""Docker sandbox: one container per environment, hardened beyond the engine's defaults.

environment.py  DockerEnvironment, the contract; runs every blocking call below in a worker thread
container.py    the life of one container: start, killing, removal
keeper.py       the container's first program, which can kill every process in it at any time
loss.py         the reason why a container was lost, from evidence outside it
hardening.py    what the container is allowed to do
exec_stream.py  one `docker exec` and its standard streams
files.py        files in and out: single files by a script as the commands' user, directories by the engine's archives
killing.py      the script that kills one command
engine.py       the engine: connecting, images, removing and reaping containers
"""

from agentkit_environments.docker.engine import BUILD_HINT, docker_failure, reap_docker
from agentkit_environments.docker.environment import DockerEnvironment

__all__ = ["BUILD_HINT", "DockerEnvironment", "docker_failure", "reap_docker"]
