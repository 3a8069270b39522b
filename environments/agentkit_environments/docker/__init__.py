"""Docker sandbox: one container per environment, hardened beyond the engine's defaults.

environment.py  DockerEnvironment, the contract
container.py    the life of one container: start, loss, removal; blocking calls
handover.py     the socket that gives the harness the listening socket of its proxy
attachment.py   the standard streams of its first program, the executor
executor/       the executor: runs commands, reads and writes files, kills
users.py        users by the image's /etc/passwd and /etc/group
files.py        directories in and out, by the engine's archives; blocking calls
snapshot.py     the files that commands can change, for a snapshot; blocking calls
hardening.py    what the container is allowed to do
loss.py         the reason why a container was lost, from evidence outside it
image.py        building an image from a folder, and an image's own settings
progress.py     what an engine says during a build
services.py     containers beside a sandbox, on a private network, and volumes that they share
engine.py       the engine: connecting, images, removing and reaping containers
"""

from agentkit_environments.docker.engine import BUILD_HINT, docker_failure, reap_docker
from agentkit_environments.docker.environment import DockerEnvironment
from agentkit_environments.docker.image import build_image, image_config
from agentkit_environments.docker.services import ServiceSpec, open_services, open_volumes

__all__ = [
    "BUILD_HINT",
    "DockerEnvironment",
    "ServiceSpec",
    "build_image",
    "docker_failure",
    "image_config",
    "open_services",
    "open_volumes",
    "reap_docker",
]
