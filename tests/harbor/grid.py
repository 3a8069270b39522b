"""Files `task.toml` with one key each, of which agentkit and harbor accept some. Imports nothing that harbor lacks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

GRID: dict[str, tuple[str, str]] = {  # start of a file -> keys, values
    "": (
        "artifacts steps",
        """["/a"] [{source="/a",destination="b"}] [{source="/a",destination="/b"}] [{source="/a",exclude=["*.o"]}]
        [{source="/a",service="db"}]
        [{name="a"}] [{name="A"},{name="a"}] [{name="s."}] [{name="con"}] [{name="a.b"}]""",
    ),
    "[task]\nname = 'a/b'\n": ("name version keywords", """'' 'a/b' 'a/.b' '1' ['x']"""),
    "[environment]\n": (
        "network_mode allowed_hosts cpus memory_mb user workdir os memory env mcp_servers healthcheck",
        """'public' 'no-network' 'allowlist' [] ['a.com'] 1 0.5 64 '2G' '/a' 'Linux' {A='b'} {command='x'}
        [{name='a',url='http://x'}] [{name='a',transport='http',url='http://x'}]
        [{name='a',transport='stdio',command='x'}] [{name='a',url='http://x',headers={Authorization='Bearer-x'}}]
        [{name='a',url='http://x',headers={Authorization='${X}'}}]""",
    ),
    "[agent]\nnetwork_mode = 'allowlist'\n": (
        "allowed_hosts timeout_sec user",
        """[] ['a.com'] ['*.a.com'] ['10.0.0.1'] ['a.com:80'] ['A.Com.'] ['::1'] ['[::1]:80'] 1 0.5 'root'""",
    ),
    "[verifier]\n": (
        "network_mode allowed_hosts environment_mode environment collect env timeout_sec",
        """'public' 'shared' 'separate' ['a.com'] {} {cpus=2} [{command='x'}] [{command='x',service='db',user=0}] 3""",
    ),
    "[[steps]]\nname = 'a'\n": (
        "min_reward artifacts healthcheck agent",
        """0.5 {a=1} ['/b'] {command='x'} {user=0}""",
    ),
}


def files() -> Iterator[str]:
    """Yield the content of each file of the grid."""
    for start, (keys, values) in GRID.items():
        for key, value in itertools.product(keys.split(), values.split()):
            yield f"{start}{key} = {value}\n"
