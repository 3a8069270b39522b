"""An MCP server over HTTP from the standard library: /mcp speaks streamable HTTP, /sse the older protocol.

It listens on the port that is given, or on a free one, of the loopback interface, and prints the port.
"""

from __future__ import annotations

import json
import queue
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

events: queue.Queue[dict[str, Any]] = queue.Queue()


def answer(message: dict[str, Any], headers: Any) -> dict[str, Any]:
    match message["method"]:
        case "initialize":
            version = message["params"]["protocolVersion"]
            about = {"serverInfo": {"name": "small", "version": "1"}, "capabilities": {"tools": {}}}
            return {"result": {"protocolVersion": version, **about}}
        case "tools/list":
            return {
                "result": {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in ("where", "large")]}
            }
        case "tools/call":
            content = {
                "where": f"{socket.gethostname()} {headers['Authorization']} {headers['Host']}",
                "large": "é" * 200_000,
            }
            return {"result": {"content": [{"type": "text", "text": content[message["params"]["name"]]}]}}
    return {"error": {"code": -32601, "message": "no such method"}}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path != "/sse":
            self.reply(405, b"")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"event: endpoint\ndata: /messages\n\n")
        while True:
            self.wfile.write(f"event: message\ndata: {json.dumps(events.get(), ensure_ascii=False)}\n\n".encode())

    def do_POST(self) -> None:
        message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if "id" not in message:
            self.reply(202, b"")
            return
        found = {"jsonrpc": "2.0", "id": message["id"], **answer(message, self.headers)}
        if self.path == "/messages":
            events.put(found)
            self.reply(202, b"")
        else:
            self.reply(200, json.dumps(found, ensure_ascii=False).encode())

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if sys.argv[1:] else 0), Handler) as server:
    print(server.server_port, flush=True)
    server.serve_forever()
