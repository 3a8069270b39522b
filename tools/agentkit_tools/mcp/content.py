"""The result of an MCP call as text and images for the model."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from agentkit_tools.parts import ImagePart, TextPart
from agentkit_tools.results import value_text

if TYPE_CHECKING:
    from mcp.types import CallToolResult, ContentBlock


def result_parts(result: CallToolResult) -> tuple[TextPart | ImagePart, ...]:
    """Return the parts of a result, with neighbouring texts joined. Other data is described in a line of text.

    Structured content is shown only if there is no text: servers repeat it as text for clients that read only text.
    """
    parts = [_part(block) for block in result.content]
    if result.structured_content is not None and not any(block.type == "text" for block in result.content):
        parts.append(value_text(result.structured_content))
    joined: list[TextPart | ImagePart] = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if is_text:
            joined.append(TextPart("\n".join(map(str, group))))
        else:
            joined += [part for part in group if isinstance(part, ImagePart)]
    return tuple(joined)


def _part(block: ContentBlock) -> str | ImagePart:
    match block.type:
        case "text":
            return block.text
        case "image":
            try:
                return ImagePart(block.mime_type, block.data)
            except ValueError:  # a type that models do not read, or not base64
                return f"[image: {block.mime_type}, {_size(block.data)} bytes]"
        case "audio":
            return f"[audio: {block.mime_type}, {_size(block.data)} bytes]"
        case "resource_link":
            about = ", ".join(filter(None, (block.uri, block.mime_type, block.description)))
            return f"[resource {block.name}: {about}]"
        case "resource":
            resource = block.resource
            if hasattr(resource, "text"):
                return f"[resource {resource.uri}]\n{resource.text}"
            return f"[resource {resource.uri}: {resource.mime_type or 'binary'}, {_size(resource.blob)} bytes]"


def _size(data: str) -> str:
    """Return the number of bytes in base64 data, as text."""
    return f"{len(data) * 3 // 4 - data.count('=', -2):,}"
