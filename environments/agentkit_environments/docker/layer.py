"""Snapshots of a sandbox `as_image`: images that the engine makes of the container's writable layer.

An image is on the engine's disk while this process needs it: for its snapshot, for a container that began with it, or
for the image of such a container. It has its container's labels, by which `reap_docker` finds the images of dead
processes, and the variables of the original image; those of commands are no setting of the container. Blocking calls.
"""

from __future__ import annotations

import base64
import json
import posixpath
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from docker import APIClient

from agentkit_environments.docker.engine import API_TIMEOUT_S, SNAPSHOTS, connect, remove_image
from agentkit_environments.docker.hardening import EXECUTOR, PROXY_SOCKET
from agentkit_environments.errors import SandboxUnavailableError, SnapshotError
from agentkit_environments.snapshot import Snapshot

COMMIT_TIMEOUT_S = 600.0
OWN_MOUNTS = {posixpath.dirname(EXECUTOR), PROXY_SOCKET}
READ_AT_START = ("/etc/passwd", "/etc/group")
GO_FILE_TYPES = 0x8F280000
"""The bits of Go's `fs.FileMode` of which a regular file has none: `fs.ModeType`."""
GO_SYMLINK = 1 << 27


class LayerImage:
    """An image of a container's files, which is removed when nothing refers to this object, and at exit."""

    def __init__(self, image_id: str, base_id: str, below: LayerImage | None) -> None:
        self.id, self.base_id = image_id, base_id
        weakref.finalize(self, _remove, image_id, below)


def _remove(image_id: str, below: LayerImage | None) -> None:
    """Remove an image, and only then let go of the one below, which the engine keeps until then."""
    try:
        client = connect()
    except SandboxUnavailableError:
        return  # `reap` removes it when the engine has returned
    try:
        remove_image(client, image_id)
    finally:
        client.close()


class LayerSnapshot(Snapshot):
    """A snapshot whose content is an image of the engine; the base class's file does not exist."""

    def __init__(self, image: LayerImage, size_bytes: int) -> None:
        self.left_out, self.entries, self.size_bytes = (), None, size_bytes
        self._image: LayerImage | None = image

    @property
    def image(self) -> LayerImage:
        """The image. Raises SnapshotError if the snapshot was closed."""
        if self._image is None:
            raise SnapshotError("this snapshot was closed; take another one")
        return self._image

    def save(self, path: str | Path) -> None:
        raise SnapshotError(
            f"the snapshot of a sandbox as_image is an image of the engine, which ends with this process; it cannot be "
            f"saved to {path}"
        )

    @contextmanager
    def descriptor(self) -> Iterator[int]:
        raise SnapshotError(
            "the snapshot of a sandbox as_image is an image of the engine; only sandboxes as_image can begin with it"
        )
        yield  # a context manager is a generator

    def close(self) -> None:
        self._image = None


def capture(
    api: APIClient, container_id: str, base_id: str, below: LayerImage | None, *, max_bytes: int
) -> LayerSnapshot:
    """Return a snapshot of a container's root file system, which is paused meanwhile.

    Args:
        api: The engine.
        container_id: A container that runs.
        base_id: The image of its specification.
        below: The image that it began with, if that is another one.
        max_bytes: Maximum size of the files that were written since it began; holes count.

    Raises:
        SnapshotError: If there are too many bytes, files outside the root file system, or too many layers, or if the
            engine cannot pause the container.
        DockerException, RequestException: If the engine fails.
    """
    volumes = [each["Destination"] for each in api.inspect_container(container_id)["Mounts"]]
    if others := sorted({*volumes} - OWN_MOUNTS):
        raise SnapshotError(
            f"the image has a volume at {', '.join(others)}, whose files a snapshot would not have; build it without "
            "VOLUME"
        )
    # not at the inspection, which has no sizes
    size = sum(each.get("SizeRw", 0) for each in api.containers(filters={"id": container_id}, size=True))
    if size > max_bytes:
        raise SnapshotError(
            f"commands have written {size} bytes of files, and a snapshot holds {max_bytes}; raise limits.disk_mib"
        )
    response = api.post(
        f"{api.base_url}/v{api.api_version}/commit",
        params={"container": container_id, "repo": SNAPSHOTS, "tag": secrets.token_hex(8), "pause": "1"},
        json={},
        timeout=COMMIT_TIMEOUT_S,  # unlike the docker library's method
    )
    if response.status_code == 404:
        response.raise_for_status()
    if not response.ok:
        raise SnapshotError(f"the engine cannot capture the container: {response.text.strip()[:500]}")
    return LayerSnapshot(LayerImage(response.json()["Id"], base_id, below), size)


def check_startable(api: APIClient, container_id: str) -> None:
    """Check a container that begins with a snapshot and has not been started.

    The engine opens the files of users when it starts a container. In place of one of them, a pipe would make it wait
    without end.

    Raises:
        SnapshotError: If one of them is neither a regular file nor a link to one.
        DockerException, RequestException: If the engine fails.
    """
    for path in READ_AT_START:
        found = _stat(api, container_id, path)
        if found is not None and found["mode"] & GO_SYMLINK:
            found = _stat(api, container_id, found["linkTarget"]) or found
        if found is not None and found["mode"] & GO_FILE_TYPES:
            raise SnapshotError(
                f"{path} of the snapshot is not a regular file, and the engine needs it to open a sandbox"
            )


def _stat(api: APIClient, container_id: str, path: str) -> dict[str, Any] | None:
    """Return the engine's information on a path, whose links are followed but for the last; None if it is missing."""
    url = f"{api.base_url}/v{api.api_version}/containers/{container_id}/archive"
    response = api.head(url, params={"path": path}, timeout=API_TIMEOUT_S)
    if response.status_code == 404:
        return None
    response.raise_for_status()
    found: dict[str, Any] = json.loads(base64.b64decode(response.headers["X-Docker-Container-Path-Stat"]))
    return found
