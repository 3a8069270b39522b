"""The Docker sandbox: one container per environment, hardened beyond the engine's defaults.

environment.py  DockerEnvironment, the contract: every blocking call below runs in a worker thread
container.py    one container's life: start, killing, removal
keeper.py       its first program, through which everything in it can be killed whatever it does
loss.py         why a container was lost, by evidence from outside
hardening.py    what the container may do
exec_stream.py  one `docker exec` and its standard streams
files.py        files in and out: one by a script of the commands' user, directories by the engine's archives
killing.py      the script that kills one command
engine.py       the engine itself: connecting, images, removing and reaping containers
"""

from agentkit_environments.docker.engine import BUILD_HINT, docker_failure, reap_docker
from agentkit_environments.docker.environment import DockerEnvironment

__all__ = ["BUILD_HINT", "DockerEnvironment", "docker_failure", "reap_docker"]
