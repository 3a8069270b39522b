"""Building images: Dockerfiles for BuildKit, and what an engine says during a build."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import docker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentkit_environments import ImageBuildError
from agentkit_environments.docker import build_image, docker_failure
from agentkit_environments.docker.engine import BASE_IMAGE
from agentkit_environments.docker.progress import BuildProgress, needs_buildkit
from agentkit_environments.folder import folder_hash

if TYPE_CHECKING:
    from tests.conftest import Tag, WaitUntil

Build = Callable[..., str]


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        ("FROM a\nRUN --mount=type=cache,target=/c true\n", True),
        ("FROM a\ncopy --chown=1 --chmod=755 a /a\n", True),
        ("FROM a\nADD --link a /a\n", True),
        ("FROM a\nRUN cat > /a <<'EOF'\nx\nEOF\n", True),
        ("FROM a\nCOPY <<EOF /a\nx\nEOF\n", True),
        ("FROM a\nRUN apt-get update && \\\n    cat <<-EOF > /a\nx\nEOF\n", True),
        ("# syntax=docker/dockerfile:1\nFROM a\nRUN true\nCOPY --chown=1:1 a /a\n", False),
        ("FROM a\nRUN echo $((1 << 2)) --nomount\nCOPY --from=b a /a\n", False),
        ("FROM a\nRUN --network=none \\\n  --mount=type=tmpfs,target=/c true\n", True),
        ("FROM a\nRUN tool --link a --mount b\n", False),
        ("FROM a\n" + "\n" * 300_000 + "RUN \\\n" * 100_000, False),
        ("FROM a\nENV X=--mount\nRUN true\n# RUN --mount=type=cache true\n", False),
    ],
)
def test_a_dockerfile_needs_buildkit_for_what_only_that_knows(tmp_path: Path, text: str, needed: bool) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    assert needs_buildkit(tmp_path / "Dockerfile") is needed


@pytest.mark.parametrize(
    "lines",
    [
        ["Step 1/3 : FROM a\n", "Step 2/3 : RUN echo why\n", "why\n"],
        ["[1/2] STEP 1/3: FROM a\n", "[2/2] STEP 2/3: RUN echo why\n", "why\n"],
    ],
    ids=["docker", "podman"],
)
def test_the_step_and_its_output_are_read(lines: list[str]) -> None:
    progress = BuildProgress()
    assert progress.step == "before the first step"
    for line in lines:
        progress.read({"stream": line})
    assert (progress.step, progress.log) == ("step 2 of 3: RUN echo why", "why\n")
    progress.read({"stream": "x" * 5000})
    assert progress.log == "x" * 2000


@given(st.binary(max_size=200))
def test_a_malformed_message_of_buildkit_is_no_error(message: bytes) -> None:
    progress = BuildProgress()
    progress.read({"id": "moby.buildkit.trace", "aux": base64.b64encode(message).decode()})
    progress.read({"stream": "Step 1/2 : FROM a\n"})
    assert progress.step == "step 1 of 2: FROM a"


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    if reason := docker_failure():
        pytest.skip(f"docker: {reason}")
    built: list[str] = []

    def run(*lines: str, dockerfile: str = "Dockerfile", timeout_s: float = 120) -> str:
        """Build a Dockerfile over the base image, with content of its own."""
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "hello").write_text(f"echo {secrets.token_hex(8)}\n")
        (folder / "Dockerfile").write_text("\n".join((f"FROM {BASE_IMAGE}", *lines, "")))
        built.append(build_image(folder, folder_hash(folder), timeout_s=timeout_s, dockerfile=dockerfile))
        return built[-1]

    yield run
    client = docker.from_env()
    for tag in built:
        client.images.remove(tag, force=True)
    client.close()


@pytest.mark.docker
def test_buildkit_builds_what_needs_it(build: Build) -> None:
    tag = build(
        "COPY --chmod=755 hello /usr/local/bin/hello",
        "RUN --mount=type=tmpfs,target=/scratch hello > /scratch/said && cp /scratch/said /said",
        "RUN test ! -e /scratch/said",
    )
    client = docker.from_env()
    said = client.containers.run(tag, ["sh", "-c", "hello | cmp - /said && stat -c %a $(which hello)"], remove=True)
    client.close()
    assert said == b"755\n"


@pytest.mark.docker
def test_a_failed_step_of_buildkit_is_named_with_its_output(build: Build) -> None:
    with pytest.raises(ImageBuildError, match=r"(?s)step 4 of 4: RUN echo why; exit 7: .*code: 7\nwhy$"):
        build("COPY --chmod=755 hello /hello", "RUN echo before", "RUN echo why; exit 7")
    with pytest.raises(ImageBuildError, match=r"base image agentkit-missing.invalid/base:1 is missing and could not"):
        build("FROM agentkit-missing.invalid/base:1", "COPY --chmod=755 hello /hello")


@pytest.mark.docker
@pytest.mark.parametrize("flag", ["", "--mount=type=tmpfs,target=/scratch"], ids=["first-builder", "buildkit"])
def test_a_silent_step_is_ended_in_time(build: Build, tag: Tag, wait_until: WaitUntil, flag: str) -> None:
    with pytest.raises(ImageBuildError, match=rf"step 2 of 2: RUN .*sleep {tag.value}: the build took more than 2 s"):
        build(f"RUN {flag} sleep {tag.value}", timeout_s=2)
    wait_until(lambda: not tag.alive(), "the end of the step")


@pytest.mark.docker
def test_here_documents_build_or_the_error_says_what_they_need(build: Build) -> None:
    """Docker before 23 has a BuildKit that does not know them."""
    client = docker.from_env()
    version = int(client.version()["Version"].split(".")[0])
    client.close()
    if version >= 23:
        assert build("RUN <<EOF", "echo hi > /hi", "EOF")
    else:
        with pytest.raises(ImageBuildError, match="knows no here-documents: use Docker 23 or newer, or begin the"):
            build("RUN <<EOF", "echo hi > /hi", "EOF")


@pytest.mark.docker
def test_a_dockerfile_that_is_missing_is_an_error_with_its_path(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ImageBuildError, match=r"other: cannot be read: No such file"):
        build("RUN true", dockerfile="other")
