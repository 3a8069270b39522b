"""Tools of MCP servers."""

from __future__ import annotations

from agentkit_tools.mcp.config import load_mcp_servers
from agentkit_tools.mcp.sandbox import MCPServerHttpInSandbox, MCPServerInSandbox
from agentkit_tools.mcp.server import MCPServer, MCPServerStdio, MCPServerStreamableHttp, MCPTool

__all__ = [
    "MCPServer",
    "MCPServerHttpInSandbox",
    "MCPServerInSandbox",
    "MCPServerStdio",
    "MCPServerStreamableHttp",
    "MCPTool",
    "load_mcp_servers",
]
