"""Services of a Harbor task: what docker-compose.yaml may say, and whole trials with services in Docker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import yaml
from hypothesis import strategies as st
from tests.fuzz import amounts, fuzz

from agentkit.errors import TaskFileError
from agentkit.harbor import VolumeConfig
from agentkit.models.scripted import Policy
from agentkit.task import HarborConfig, Task
from agentkit_environments import SandboxUnavailableError, ServiceError, available_backends, reap
from agentkit_environments.folder import folder_hash, image_tag
from agentkit_evals.harbor import read_task_directory
from agentkit_evals.harbor.compose import Build, Compose, Healthcheck, Service
from agentkit_evals.record import RunDirectory
from agentkit_evals.selfcheck import selfcheck
from agentkit_evals.verify import opened

Evaluate = Callable[..., RunDirectory]
MakeScript = Callable[..., Policy]
Make = Callable[..., Path]
DOCKER = available_backends()["docker"]

SERVER = """\
import http.server, os, pathlib
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/seed":
            text = pathlib.Path("/data/seed.txt").read_text() + os.environ["SUFFIX"]
        else:
            text = "ok"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())
assert os.path.ismount("/var/state"), "the named volume"
http.server.HTTPServer(("", 8000), Handler).serve_forever()
"""
GET = "python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())'"
REACH = """\
import ipaddress, socket
own = ipaddress.ip_interface(socket.gethostbyname("main") + "/16")
for address in (next(own.network.hosts()), "172.17.0.1", "192.0.2.1"):
    try:
        socket.create_connection((str(address), PORT), timeout=1)
        print("reached", address)
    except OSError:
        pass
print("done")
"""
"""Tries the gateway of the private network, the usual address of the host, and one outside."""
COMPOSE = f"""\
services:
  main:
    depends_on:
      web: {{condition: service_healthy}}
    environment: [WEB=http://web:8000]
    networks: [inner]
  web:
    build: ./web
    command: python3 /srv/server.py
    environment: {{SUFFIX: "!$$"}}
    volumes: ["./seed:/data:ro", "state:/var/state"]
    networks: [inner]
    expose: [8000]
    healthcheck:
      test: {GET} http://localhost:8000/
      interval: 200ms
      retries: 100
    depends_on: [once]
  once:
    image: agentkit-base:latest
    command: ["sh", "-c", "exit $(echo 0)"]
    networks: [inner, default]
volumes: {{state: }}
networks: {{inner: {{driver: bridge}}}}
"""


TERMINAL_BENCH = f"""\
services:
  client:
    build: {{context: client, dockerfile: Dockerfile}}
    image: ${{T_BENCH_TASK_DOCKER_CLIENT_IMAGE_NAME}}
    container_name: ${{T_BENCH_TASK_DOCKER_CLIENT_CONTAINER_NAME}}
    command: ["sh", "-c", "sleep infinity"]
    working_dir: /app
    environment: ["TEST_DIR=${{T_BENCH_TEST_DIR}}", "WEB=http://web:8000"]
    volumes: ["${{T_BENCH_TASK_LOGS_PATH}}:${{T_BENCH_CONTAINER_LOGS_PATH}}"]
    depends_on: {{web: {{condition: service_healthy}}}}
  web:
    build: ./web
    image: ${{T_BENCH_TASK_DOCKER_NAME_PREFIX}}__web
    command: python3 /srv/server.py
    environment: {{SUFFIX: "!"}}
    volumes: ["./seed:/data:ro", "/var/state"]
    healthcheck:
      test: {GET} http://localhost:8000/
      interval: 200ms
      retries: 100
"""
SHARING = """\
services:
  main:
    image: ${MAIN_IMAGE_NAME}
    command: [sh, -c, "cat /etc/greeting > /run/started; sleep infinity"]
    volumes: [./greeting:/etc/greeting, "keys:/run/keys:ro", "work:/work"]
    depends_on: {issuer: {condition: service_healthy}}
  issuer:
    build: {dockerfile: issuer/Dockerfile, target: keys, args: {KEY: 7}}
    restart: on-failure
    user: "0"
    working_dir: /issued
    command:
      - sh
      - -c
      - |
        test -e tried || { touch tried; exit 1; }
        cp /key key
        while :; do cp /work/* /issued 2>/dev/null; sleep 0.1; done
    volumes: ["keys:/issued", "work:/work:ro"]
    healthcheck: {test: test -s /issued/key, interval: 200ms, retries: 100}
volumes: {keys: , work: }
"""
SHARING_FILES = {
    "environment/greeting": "hello",
    "environment/issuer/Dockerfile": """FROM agentkit-base:latest AS keys
ARG KEY
RUN echo $KEY > /key
FROM agentkit-base:latest
RUN false
""",
    "solution/solve.sh": """#!/bin/sh
cat /run/keys/key > /work/answer
while [ ! -s /run/keys/answer ]; do sleep 0.1; done
""",
    "tests/test.sh": """#!/bin/sh
touch /run/keys/x && exit 1  # read-only
[ "$(cat /run/started)" = hello ] && [ "$(cat /run/keys/answer)" = 7 ] && echo 1 > /logs/verifier/reward.txt
exit 0
""",
}


@pytest.fixture(scope="module")
def images() -> Iterator[set[str]]:
    """Names of images that are removed after the tests of this file, which share them."""
    built: set[str] = set()
    yield built
    if DOCKER is None:
        subprocess.run(["docker", "rmi", "-f", *built], capture_output=True, check=False)


@pytest.fixture
def make(tmp_path: Path, images: set[str]) -> Make:
    """Function that makes a task directory with a docker-compose.yaml."""

    def write(compose: str = COMPOSE, **files: str) -> Path:
        folder = tmp_path / "task"
        content = {
            "task.toml": 'environment.network_mode = "no-network"\n',
            "instruction.md": "Fetch the seed.",
            "environment/Dockerfile": "FROM agentkit-base:latest\nWORKDIR /app\n",
            "environment/docker-compose.yaml": compose,
            "environment/web/Dockerfile": "FROM agentkit-base:latest\nCOPY server.py /srv/\n",
            "environment/web/server.py": SERVER,
            "environment/seed/seed.txt": "42",
            "tests/test.sh": '#!/bin/sh\n[ "$(cat answer.txt)" = "42!$" ] && echo 1 > /logs/verifier/reward.txt\n',
            "solution/solve.sh": f'#!/bin/sh\n{GET} "$WEB/seed" > answer.txt\n',
            **files,
        }
        for path, text in content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        images.update(image_tag(folder_hash(folder / place)) for place in ("environment", "environment/web"))
        return folder

    return write


def config_of(task: Task) -> HarborConfig:
    assert isinstance(task.verifier, HarborConfig)
    return task.verifier


def test_services_are_read(make: Make) -> None:
    task = read_task_directory(make())
    config = config_of(task)
    once, web = config.services
    assert (once.name, once.command, web.name, web.command) == (
        "once",
        ["sh", "-c", "exit $(echo 0)"],
        "web",
        ["python3", "/srv/server.py"],
    )
    assert (web.env, web.files, web.depends_on) == (
        {"SUFFIX": "!$"},
        {"/data": "environment/seed"},
        {"once": "service_started"},
    )
    assert web.healthcheck is not None and (web.healthcheck.interval_s, web.healthcheck.retries) == (0.2, 100)
    assert (web.volumes, once.volumes) == ({"/var/state": VolumeConfig(name="state")}, {})
    assert web.build is not None and web.build.folder.endswith("environment/web")
    assert config.wait_for == {"web": "service_healthy"} and task.environment.env == {"WEB": "http://web:8000"}
    assert Task.model_validate_json(task.model_dump_json()) == task, "run.json holds the task"


def service(text: str) -> str:
    return f"services:\n  db:\n    image: x\n    {text}\n"


@pytest.mark.parametrize(
    ("compose", "problem"),
    [
        ("services: {}\n", r"docker-compose\.yaml:1: services: "),
        ("networks: {a: {external: true}}\nservices: {db: {image: x}}\n", r':1: unknown key "networks\.a\.external"'),
        (service("networks: [a]"), r"services\.db: networks: 'a' is not in `networks` of the file"),
        (
            "networks: {a: }\nservices: {db: {image: x, networks: [a]}}\n",
            r":1: networks: services that share no network",
        ),
        (
            service("networks: {default: {ipv4_address: 10.0.0.5}}"),
            r':4: unknown key "services\.db\.networks\.default\.ipv4_address"',
        ),
        (
            "services: {main: {networks: {default: {aliases: [a b]}}}, db: {image: x}}\n",
            r":1: services\.main\.networks\.default\.aliases\.0: 'a b' cannot be the name of a host",
        ),
        (service("privileged: true"), r":4: services\.db\.privileged: the rights of sandboxes and services cannot"),
        (service("cap_add: [SYS_ADMIN]"), r":4: services\.db\.cap_add: the rights of"),
        (service("security_opt: [seccomp=unconfined]"), r":4: services\.db\.security_opt"),
        (service("network_mode: host"), r":4: services\.db\.network_mode: input should be 'bridge' or 'none'"),
        (service("network_mode: bridge"), r"services\.db: network_mode: services share a private network"),
        ("services: {db: {}}\n", r"services\.db: give either image or build"),
        ("services: {main: {build: ../..}}\n", r"services\.main: build: '\.\./\.\.' lies outside .*/task$"),
        ("services: {db: {build: seed}}\n", r"services\.db: build: .*seed/Dockerfile is missing"),
        ("services: {db: {build: {dockerfile: ../task.toml}}}\n", r"services\.db: build: .* lies outside"),
        ("services: {db: {build: {args: [A]}}}\n", r":1: services\.db\.build\.args: 'A' has no value"),
        ("services: {db: {build: {args: {A: '${B}'}}}}\n", r":1: services\.db\.build\.args: .* Harbor does not set"),
        ("services: {db: {build: {secrets: [a]}}}\n", r':1: unknown key "services\.db\.build\.secrets"'),
        (service("volumes: ['/etc:/etc']"), r"services\.db: volumes: '/etc:/etc': expected \./PATH:/TARGET"),
        (
            service("volumes: ['data:/data']"),
            r"services\.db: volumes: 'data:/data': expected .* NAME:/TARGET of a named",
        ),
        (
            "volumes: {v: }\n" + service("volumes: ['v:/']"),
            r"services\.db: volumes: 'v:/': '/' is not the absolute path",
        ),
        (service("volumes: ['data:/data:z']"), r"services\.db: volumes: 'data:/data:z': expected"),
        (
            service("volumes: [{type: tmpfs, target: /t}]"),
            r":4: services\.db\.volumes.*expected SOURCE:TARGET, or type",
        ),
        (service("volumes: ['${HOST_AGENT_LOGS_PATH}:/l']"), r"services\.db: volumes: '/HOST_AGENT_LOGS_PATH:/l': exp"),
        *(
            (
                f"volumes: {{v: }}\nservices: {{main: {{volumes: ['v:{path}']}}}}\n",
                rf"services\.main: volumes: '{path}': a service could change how the agent is scored",
            )
            for path in ("/logs", "/logs/verifier/x", "/tests")
        ),
        (service("volumes: ['./../..:/data']"), r"services\.db: volumes: '\./\.\./\.\.' lies outside"),
        (service("volumes: ['./seed:/']"), r"services\.db: volumes: .* '/' is not the absolute path"),
        (service("volumes: ['./none:/data']"), r"services\.db: volumes: .*none is missing"),
        (service("command: echo ${HOME}"), r":4: services\.db\.command.*a variable that Harbor does not set is supp"),
        (service("command: 'echo ${A:+b}'"), r":4: services\.db\.command.*'\$\{' begins no variable; write \$\$\{"),
        (service("environment: [=A]"), r":4: services\.db\.environment.*expected NAME=VALUE"),
        (service("environment: {A: 'a${B}'}"), r":4: services\.db\.environment.*only as a whole value of `env"),
        (service("cpus: many"), r"services\.db: limits: 'many' is not a number of CPUs"),
        (service("mem_limit: 1q"), r"services\.db: limits: '1q' is not a size"),
        (service("platform: linux/s390x"), r":4: services\.db\.platform: 'linux/s390x' is not the platform of this"),
        (service("restart: sometimes"), r":4: services\.db\.restart"),
        (
            service("healthcheck: {test: x, interval: 5}"),
            r":4: services\.db\.healthcheck\.interval: 5 is not a duration",
        ),
        (service("healthcheck: {test: [curl, x]}"), r"services\.db: .*expected a command, or a list"),
        (service("depends_on: [nobody]"), r"services\.db: depends_on: 'nobody' is not one of the other services"),
        (service("depends_on: [db]"), r"services depend on each other: db > db"),
        (service("depends_on: {db: {condition: ready}}"), r":4: services\.db\.depends_on\.db\.condition"),
        ("services: {'a b': {image: x}}\n", r"services\.a b: name"),
        ("services: {main: {working_dir: app}}\n", r"services\.main: working_dir: 'app' is not an absolute path"),
        (
            "services: {main: {volumes: ['./seed:/etc/hosts']}}\n",
            r"services\.main: volumes: /etc/hosts is written by the",
        ),
    ],
)
def test_what_is_not_supported_is_named(make: Make, compose: str, problem: str) -> None:
    with pytest.raises(TaskFileError, match=problem):
        read_task_directory(make(compose))


ADAPTERS = """\
services:
  main:
    build:
      context: ${CONTEXT_DIR}
    image: ${MAIN_IMAGE_NAME}
    command: [ "sh", "-c", "sleep infinity" ]
    network_mode: ${NETWORK_MODE:-bridge}
    security_opt: [label=disable]
    privileged: false
    environment:
      - TEST_DIR=${TEST_DIR}
      - API_KEY
      - MODE=${MODE-fast}
      - URL=http://web-${COMPOSE_PROJECT_NAME}:80
    volumes:
      - ${HOST_VERIFIER_LOGS_PATH}:${ENV_VERIFIER_LOGS_PATH}
      - ${HOST_AGENT_LOGS_PATH}:${ENV_AGENT_LOGS_PATH}
    deploy:
      resources:
        limits:
          cpus: ${CPUS}
          memory: ${MEMORY}
"""
"""The file that Harbor's adapters write beside each task, with further variables."""


def test_the_file_that_adapters_write_is_the_sandbox_as_it_is_without_it(make: Make) -> None:
    limits = "[environment]\ncpus = 2\nmemory_mb = 3000\nallow_internet = false\n"
    task = read_task_directory(make(ADAPTERS, **{"task.toml": limits}))
    assert task.environment.network.agent == "none"
    cut_off = make(ADAPTERS.replace("${NETWORK_MODE:-bridge}", "none"), **{"task.toml": ""})
    assert read_task_directory(cut_off).environment.network.agent == "none"
    config, plain = config_of(task), task.environment
    assert plain.build is not None and plain.image is None
    assert (plain.limits.cpus, plain.limits.memory_mib) == (2, 3000)
    assert plain.env == {
        "TEST_DIR": "/tests",
        "API_KEY": "${API_KEY}",
        "MODE": "${MODE:-fast}",
        "URL": "http://web-agentkit:80",
    }
    assert (config.services, config.volumes, config.files) == ([], {}, {})


@pytest.mark.parametrize(
    ("keys", "toml", "cpus", "memory_mib"),
    [
        ("cpus: 0.5, mem_limit: 64m", "", 0.5, 64),
        ("cpus: '3', mem_limit: 1.5gb", "cpus = 2\nmemory_mb = 100", 3, 1536),
        ("deploy: {resources: {limits: {cpus: '${CPUS:-4}', memory: '${MEMORY:-8G}'}}}", "", 4, 8192),
        ("deploy: {resources: {limits: {cpus: '${CPUS:-4}', memory: $MEMORY}}}", 'cpus = 2\nmemory = "1G"', 2, 1024),
        ("mem_limit: 104857600", "cpus = 2", 2, 100),
    ],
)
def test_limits_of_a_service(make: Make, keys: str, toml: str, cpus: float, memory_mib: int) -> None:
    for name in ("main", "db"):
        compose = f"services: {{{name}: {{image: x, {keys}}}}}"
        task = read_task_directory(make(compose, **{"task.toml": f"[environment]\n{toml}\n"}))
        for found in [task.environment.limits] if name == "main" else config_of(task).services:
            assert (found.cpus, found.memory_mib) == (cpus, memory_mib)


def test_the_settings_of_main(make: Make) -> None:
    compose = """
x-common: &common {init: true, tty: true}
services:
  main:
    <<: *common
    platform: linux
    networks: {default: {aliases: [agent]}}
    working_dir: /srv
    user: 1000
    entrypoint: /bin/start
    command: serve --port 80
    healthcheck: {test: [CMD, test, -f, a b], interval: 5s}
    volumes: [./seed/seed.txt:/etc/seed:ro, alone:/alone]
  db: {image: "${MAIN_IMAGE_NAME}", restart: always, container_name: base, networks: {default: {aliases: [store]}}}
volumes: {alone: }
"""
    task = read_task_directory(make(compose))
    config, main = config_of(task), task.environment
    assert (main.workdir, main.user, config.entrypoint) == ("/srv", "1000", ["/bin/start"])
    assert config.command == ["serve", "--port", "80"]
    assert config.aliases == ["agent"]
    assert config.healthcheck is not None
    assert (config.healthcheck.command, config.healthcheck.interval_sec) == ("test -f 'a b'", 5)
    assert config.files == {"/etc/seed": "environment/seed/seed.txt"}
    assert config.volumes == {}, "a volume that no service shares is a folder"
    (db,) = config.services
    assert db.build is not None and main.build is not None and db.build.sha256 == main.build.sha256
    assert (db.restart, db.aliases) == ("always", ["base", "store"])


def test_the_name_of_main_is_that_of_the_built_image(make: Make) -> None:
    compose = "services: {main: {image: mine}, job: {image: mine}, db: {build: web, image: stock}, dup: {image: stock}}"
    task = read_task_directory(make(compose))
    config, main = config_of(task), task.environment.build
    assert main is not None and main.folder.endswith("environment") and task.environment.image is None
    builds = {service.name: service.build for service in config.services}
    assert builds["job"] == main and builds["db"] == builds["dup"] != main

    pulled = read_task_directory(make(compose, **{"task.toml": 'environment.docker_image = "theirs"\n'})).environment
    assert (pulled.image, pulled.build) == ("theirs", None)


def test_how_images_are_built(make: Make) -> None:
    compose = """
services:
  main: {build: {context: .., dockerfile: environment/web/Dockerfile, args: {LEVEL: 3}}}
  db: {build: {dockerfile: web/Dockerfile, target: base, args: [NAME=a, "PLACE=${CONTEXT_DIR}"]}}
"""
    toml = 'environment.build_timeout_sec = 30\nverifier.environment_mode = "separate"\n'
    task = read_task_directory(make(compose, **{"task.toml": toml}))
    main, (db,), (step,) = task.environment.build, config_of(task).services, config_of(task).steps
    assert step.separate is not None and step.separate.build == main, "a fresh sandbox like the agent's"
    assert main is not None and db.build is not None
    assert (main.folder, main.dockerfile, main.target, main.args, main.timeout_s) == (
        config_of(task).folder,
        "environment/web/Dockerfile",
        None,
        {"LEVEL": "3"},
        30,
    )
    assert db.build.folder == f"{main.folder}/environment"
    assert (db.build.dockerfile, db.build.target, db.build.args) == (
        "web/Dockerfile",
        "base",
        {"NAME": "a", "PLACE": "."},
    )
    ways: list[dict[str, Any]] = [{}, {"dockerfile": "a"}, {"target": "a"}, {"args": {"a": ""}}, {"args": {"b": ""}}]
    images = {db.build.model_copy(update=way).image for way in ways} | {image_tag(db.build.sha256)}
    assert len(images) == len(ways) + 1, "each way to build a folder has an image of its own"


TEXTS = ["web", "seed", "./seed:/data", "../..", "/", "", "\0", '"', "$", "${A}", "$$", "10s", "A=b", "CMD"]
scalars = st.sampled_from([*TEXTS, None, True, -1, 0, 1 << 40, 1.5]) | st.text(max_size=4)
fields = st.sampled_from(
    [*Service.model_fields, *Build.model_fields, *Healthcheck.model_fields, "condition", "main", "db", "loop"]
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=3), max_leaves=4
)
services = st.dictionaries(
    st.sampled_from(["main", "db", "web", "a b"]), st.dictionaries(fields, values, max_size=3) | values, max_size=3
)


ODD: list[dict[str, Any]] = [
    {"build": "a\0b"},
    {"build": "a\x1eb"},
    {"build": "x" * 300},
    {"image": "x", "volumes": ["./loop:/a"]},
    {"image": "x", "command": "echo '"},
]


@amounts(200, 3_000)
def test_any_services_are_read_or_refused(examples: int, make: Make) -> None:
    def check(document: Any) -> None:
        path = make(yaml.safe_dump(document)) / "environment" / "docker-compose.yaml"
        if not (loop := path.with_name("loop")).is_symlink():
            loop.symlink_to("loop")
        try:
            Compose(path)
        except TaskFileError as exc:
            assert all(line.startswith(str(path.parent)) for line in str(exc).splitlines())

    for service in ODD:
        check({"services": {"db": service}})
    fuzz(check, st.fixed_dictionaries({"services": services}) | values, examples)


def docker(*arguments: str) -> list[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True).stdout.split()


def left_of(run_id: str) -> list[str]:
    """Return the ids of the containers, networks and volumes of a run."""
    label = f"label=agentkit.run={run_id}"
    kinds = (["ps", "-aq"], ["network", "ls", "-q"], ["volume", "ls", "-q"])
    return [each for kind in kinds for each in docker(*kind, "--filter", label)]


@pytest.mark.docker
@pytest.mark.skipif(DOCKER is not None, reason=f"no Docker: {DOCKER}")
class TestInDocker:
    def test_a_sound_task(self, make: Make) -> None:
        checked = anyio.run(selfcheck, read_task_directory(make()))
        assert checked.problems == []

    def test_volumes_files_builds_and_a_command_of_the_agents_sandbox(self, make: Make, images: set[str]) -> None:
        task = read_task_directory(make(SHARING, **SHARING_FILES))
        images.update(service.build.image for service in config_of(task).services if service.build is not None)
        checked = anyio.run(selfcheck, task)
        assert checked.problems == []

    def test_a_terminal_bench_task_with_a_service(self, tmp_path: Path, images: set[str]) -> None:
        folder = tmp_path / "fetch"
        content = {
            "task.yaml": "instruction: Fetch the seed.\ndifficulty: easy\n",
            "docker-compose.yaml": TERMINAL_BENCH,
            "client/Dockerfile": "FROM agentkit-base:latest\nWORKDIR /srv\n",
            "web/Dockerfile": "FROM agentkit-base:latest\nCOPY server.py /srv/\n",
            "web/server.py": SERVER,
            "seed/seed.txt": "42",
            "tests/expected": "42!",
            "run-tests.sh": '#!/bin/sh\ncmp answer.txt "$TEST_DIR/expected" && echo PASSED a.py::a\n',
            "solution.sh": f'#!/bin/sh\n{GET} "$WEB/seed" | tr -d "\\n" > answer.txt\n',
        }
        for path, text in content.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        task = read_task_directory(folder)
        builds = [task.environment.build, *(service.build for service in config_of(task).services)]
        images.update(build.image for build in builds if build is not None)
        checked = anyio.run(selfcheck, task)
        assert (checked.problems, checked.oracle.tests) == ([], 1)

    @pytest.mark.parametrize("network", ["environment.network_mode", "agent.network_mode"])
    def test_the_agent_reaches_the_services_and_nothing_else(
        self, make: Make, evaluate: Evaluate, script: MakeScript, network: str
    ) -> None:
        command = f"{GET} $WEB/seed > answer.txt; python3 - <<'END'\n{REACH}END"
        with socket.create_server(("0.0.0.0", 0)) as host:
            policy = script([("bash", {"command": command.replace("PORT", str(host.getsockname()[1]))})], "Done.")
            task = read_task_directory(make(**{"task.toml": f'{network} = "no-network"\n'}))
            done = evaluate((task, policy), backend=None)
        (trial,) = done.trials
        assert (trial.error, trial.reward) == (None, 1.0)
        trajectory = done.trajectory(trial)
        assert trajectory is not None
        result = next(message.content for message in trajectory.messages if message.role == "tool")
        assert result.strip() == "done"
        assert done.lock.run_id is not None and left_of(done.lock.run_id) == []

    @pytest.mark.parametrize(
        ("command", "problem"),
        [
            ("sh -c 'echo no licence; exit 3'", "service web exited with status 3 before it was healthy.*no licence"),
            ("sleep 100", "service web is unhealthy"),
        ],
    )
    def test_a_service_that_does_not_start_is_named(self, make: Make, command: str, problem: str) -> None:
        compose = COMPOSE.replace("python3 /srv/server.py", command).replace("retries: 100", "retries: 1")
        task = read_task_directory(make(compose))

        async def use() -> None:
            async with opened(task, "docker", "services-test"):
                pass

        with pytest.raises(ServiceError, match=f"(?s){problem}"):
            anyio.run(use)
        assert left_of("services-test") == []

    def test_podman_is_refused_where_services_would_reach_this_machine(
        self, make: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("agentkit_environments.docker.services.is_podman", lambda client: True)

        async def use() -> None:
            async with opened(read_task_directory(make()), "docker", "services-podman"):
                pass

        with pytest.raises(SandboxUnavailableError, match="with Podman, services and the sandbox would reach"):
            anyio.run(use)
        assert left_of("services-podman") == []

    def test_services_of_a_harness_that_was_killed_are_reaped(self, make: Make) -> None:
        program = f"""
import anyio
from agentkit_evals.harbor import read_task_directory
from agentkit_evals.verify import opened
from pathlib import Path
async def main():
    async with opened(read_task_directory(Path({str(make(SHARING, **SHARING_FILES))!r})), "docker", "services-killed"):
        print("open", flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""
        harness = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert harness.stdout is not None and harness.stdout.readline() == "open\n"
        os.kill(harness.pid, signal.SIGKILL)
        harness.wait()
        harness.stdout.close()
        assert len(left_of("services-killed")) >= 4
        anyio.run(reap)
        assert left_of("services-killed") == []
