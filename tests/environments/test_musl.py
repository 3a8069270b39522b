"""An image without glibc's libraries: Debian's musl, a program linked against it, and a shell.

The shell is Debian's static busybox, so what a distribution like Alpine adds, and a shell of musl's, is not tested.
"""

from __future__ import annotations

import io
import secrets
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import docker
import pytest

from agentkit_environments import EnvironmentSpec, open_environment
from agentkit_environments.docker import docker_failure

if TYPE_CHECKING:
    from tests.conftest import Tag

pytestmark = [pytest.mark.anyio, pytest.mark.docker]
APPLETS = "sh cat echo find grep head id ls mkdir setsid sleep stat touch true wc".split()
PROBE = r"""
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *copy(void *text) { return strdup(text); }

/* Pass a text through a thread and a file to a child process, which prints it. */
int main(int argc, char **argv) {
    pthread_t thread;
    void *text;
    FILE *file;
    if (argc != 2 || pthread_create(&thread, 0, copy, argv[1]) || pthread_join(thread, &text)) return 1;
    if (!(file = fopen("probe.txt", "w")) || fputs(text, file) < 0 || fclose(file)) return 2;
    return system("cat probe.txt");
}
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    reason = docker_failure()
    if reason is not None:
        pytest.skip(f"docker: {reason}")
    compiler, busybox = shutil.which("musl-gcc"), shutil.which("busybox")
    if compiler is None or busybox is None or b"/ld-linux" in Path(busybox).read_bytes():
        pytest.skip("no musl, or no static busybox; on Debian, `apt-get install musl-tools busybox-static`")
    folder = tmp_path_factory.mktemp("musl")
    (folder / "probe.c").write_text(PROBE)
    subprocess.run([compiler, "-o", folder / "probe", folder / "probe.c", "-pthread"], check=True)
    [loader] = Path("/lib").glob("ld-musl-*.so.1")
    assert bytes(loader) in (folder / "probe").read_bytes(), "the program is not linked dynamically"

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for source, name in ((loader, str(loader)[1:]), (busybox, "bin/busybox"), (folder / "probe", "bin/probe")):
            content = Path(source).read_bytes()
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o755
            archive.addfile(member, io.BytesIO(content))
        for applet in APPLETS:
            member = tarfile.TarInfo(f"bin/{applet}")
            member.type, member.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(member)
        passwd = b"root:x:0:0::/root:/bin/sh\nmaker:x:1234:1234::/home/maker:/bin/sh\n"
        member = tarfile.TarInfo("etc/passwd")
        member.size = len(passwd)
        archive.addfile(member, io.BytesIO(passwd))
    name = f"agentkit-test-{secrets.token_hex(4)}"
    client = docker.from_env()
    try:
        client.api.import_image_from_data(data.getvalue(), repository=name)
        yield name
        client.images.remove(name, force=True)
    finally:
        client.close()


@pytest.mark.parametrize("as_image", [False, True], ids=["hardened", "as-image"])
async def test_an_image_with_musl(image: str, as_image: bool, tag: Tag) -> None:
    spec = EnvironmentSpec(image=image, as_image=as_image, workdir="" if as_image else "/workspace")
    async with await open_environment(spec, backend="docker") as env:
        glibc = await env.exec(
            "find / -xdev -name 'libc.so.6' -o -xdev -name 'ld-linux*'; find / -xdev -name 'ld-musl*'"
        )
        assert glibc.stdout.startswith("/lib/ld-musl-") and glibc.stdout.count("\n") == 1
        ran = await env.exec(["probe", "grüße"])
        assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "grüße", "")
        assert (await env.exec("cat; echo err >&2; exit 3", stdin="in")).exit_code == 3
        if as_image:
            assert (await env.exec("id -u; echo $HOME", user="maker")).stdout == "1234\n/home/maker\n"

        await env.write_file("/tmp/d/f", "text")
        await env.write_file("bytes", bytes(range(256)) * 1000)
        assert await env.read_file("bytes") == bytes(range(256)) * 1000
        assert (await env.exec("cat /tmp/d/f; wc -c < bytes")).stdout == "text256000\n"

        sleeps = f"sleep {tag.value} & setsid sleep {tag.value} & sleep {tag.value}"
        timed_out = await env.exec(sleeps, timeout_s=1)
        assert (timed_out.exit_code, timed_out.timed_out) == (137, True)
        tag.wait(0)
        await env.exec(f"{{ {sleeps}; }} >/dev/null 2>&1 &")
        tag.wait(3)
        await env.kill_all()
        tag.wait(0)

        async with env.fork(2) as forks:
            for number, fork in enumerate(forks):
                assert (await fork.exec("cat probe.txt /tmp/d/f; wc -c < bytes")).stdout == "grüßetext256000\n"
                assert (await fork.exec(["probe", str(number)])).stdout == str(number)
        assert await env.read_file("probe.txt") == "grüße".encode()
