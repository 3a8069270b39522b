"""A hand-written MCP server over stdio that misbehaves on request: `rough_mcp_server.py [MODE]`.

Modes, at the start: `exit` ends with status 3, `silent` answers nothing, `garbage` prints only text that is not
JSON-RPC, `refuse` answers with an error, `noisy` prints a line of garbage and then works, `odd` lists odd tools,
`paged` lists one tool a page, `endless` lists pages without end, `once` starts only the first time, and `twice` is
silent the second time. `strict` ends at a first message that is not `initialize`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODE = sys.argv[1] if len(sys.argv) > 1 else ""
ANY = {"type": "object"}
TOOLS: list[Any] = [
    {"name": name, "inputSchema": ANY}
    for name in ("crash", "hang", "freeze", "fail", "spawn", "slow", "invalid", "stubborn", "large")
]
TOOLS.append(
    {
        "name": "echo",
        "description": "Return the arguments.",
        "inputSchema": {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "times": {"type": "integer"},
                "note": {"type": ["string", "null"]},
            },
            "required": ["text"],
        },
        "outputSchema": {"type": "object", "required": ["never there"]},
        "annotations": {"readOnlyHint": True},
    }
)
DEEP: dict[str, Any] = {"type": "object"}
for _ in range(70):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
ODD: list[Any] = [
    {"name": "fine", "title": "Fine", "inputSchema": ANY},
    {"name": "no schema"},
    {"name": "null", "inputSchema": None},
    {"name": "text", "inputSchema": "object"},
    {"name": "array", "inputSchema": {"type": "array"}},
    {"name": "empty", "inputSchema": {}},
    {"name": "type", "inputSchema": {"type": "object", "properties": {"a": {"type": "strin\x1b[31mg"}}}},
    {"name": "properties", "inputSchema": {"type": "object", "properties": [1]}},
    {"name": "dangling", "inputSchema": {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}},
    {"name": "remote", "inputSchema": {"type": "object", "properties": {"a": {"$ref": "https://example.com/a.json"}}}},
    {"name": "deep", "inputSchema": DEEP},
    {"name": "large", "inputSchema": {"type": "object", "enum": [*range(200_000)]}},
    {"name": "pattern", "inputSchema": {"type": "object", "properties": {"a": {"pattern": "("}}}},
    {"name": "fine", "inputSchema": ANY},
    {"name": 7, "inputSchema": ANY},
    "not a tool",
    {"name": "also fine", "description": 7, "annotations": "none", "icons": 3, "inputSchema": ANY, "outputSchema": 1},
]


def send(message: dict[str, Any]) -> None:
    print(json.dumps({"jsonrpc": "2.0"} | message), flush=True)


def text(content: str, **extra: Any) -> dict[str, Any]:
    return {"content": [{"type": "text", "text": content}]} | extra


def call(name: str, params: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a call; None if there is none."""
    with Path("calls").open("a") as calls:
        calls.write(f"{name}\n")
    match name:
        case "echo":
            return text(json.dumps(params["arguments"]), structuredContent={"unlike": "the schema"})
        case "crash":
            sys.exit(5)
        case "freeze":
            time.sleep(600)
        case "fail":
            return text("there is no such file", isError=True)
        case "invalid":
            return {"content": "not a list"}
        case "large":
            return text("a" * 300_000)
        case "spawn":
            daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
            other = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600 & wait"])
            Path("pids").write_text(f"{daemon.pid} {other.pid}")
            return text("done")
        case "stubborn":
            import signal

            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            Path("stubborn").touch()
            return text("done")
        case "slow":
            for step in range(12):
                time.sleep(0.1)
                token = params["_meta"]["progressToken"]
                send({"method": "notifications/progress", "params": {"progressToken": token, "progress": step}})
            return text("done")
        case "hang":
            return None
    raise LookupError(f"no tool is named {name}")


def answer(method: str, params: dict[str, Any]) -> dict[str, Any] | None:
    match method:
        case "initialize":
            about = {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}}
            return about | {"serverInfo": {"name": "rough", "version": "1"}}
        case "tools/list" if MODE == "odd":
            return {"tools": ODD}
        case "tools/list" if MODE == "paged":
            index = int(params.get("cursor", 0))
            more = {"nextCursor": str(index + 1)} if index + 1 < len(TOOLS) else {}
            return {"tools": TOOLS[index : index + 1]} | more
        case "tools/list" if MODE == "endless":
            return {"tools": [], "nextCursor": "again"}
        case "tools/list":
            return {"tools": TOOLS}
        case "tools/call":
            return call(params["name"], params)
    raise LookupError(method)


def main() -> None:
    print("starting", file=sys.stderr, flush=True)
    if MODE == "once" and Path("started").exists():
        sys.exit(4)
    initialized = False
    silent = MODE in ("silent", "garbage")
    if MODE == "twice":
        silent = Path("started").exists() and not Path("again").exists()
        if silent:
            Path("again").touch()
    Path("started").touch()
    if MODE == "exit":
        print("cannot log in with s3cret-value", file=sys.stderr)
        sys.exit(3)
    if MODE in ("noisy", "garbage"):
        print("Hello, I am a server", flush=True)
    for line in sys.stdin:
        message = json.loads(line)
        if MODE == "strict" and not initialized and message["method"] != "initialize":
            sys.exit("expected initialize")
        initialized = True
        if silent or "id" not in message:
            continue
        try:
            if MODE == "refuse":
                raise LookupError("the license has expired")
            result = answer(message["method"], message.get("params", {}))
        except LookupError as error:
            send({"id": message["id"], "error": {"code": -32000, "message": str(error)}})
            continue
        if result is not None:
            send({"id": message["id"], "result": result})
    while Path("stubborn").exists():
        time.sleep(1)


main()
