"""Parts of a message: text and images."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

IMAGE_TYPES = ("image/png", "image/jpeg", "image/gif", "image/webp")


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text in a message."""

    text: str
    type: Literal["text"] = "text"
    __pydantic_config__ = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class ImagePart:
    """An image in a message: its media type and its bytes in base64.

    Raises:
        ValueError: the media type is not one of `IMAGE_TYPES`, or `data` is not base64.
    """

    media_type: str
    data: str
    type: Literal["image"] = "image"
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __post_init__(self) -> None:
        if self.media_type not in IMAGE_TYPES:
            raise ValueError(f"an image's media type must be one of {', '.join(IMAGE_TYPES)}, got {self.media_type!r}")
        try:
            base64.b64decode(self.data, validate=True)
        except (binascii.Error, ValueError) as exc:
            raise ValueError(f"the data of an image must be base64, got {self.data!r:.40}") from exc

    @classmethod
    def of(cls, content: bytes, media_type: str) -> ImagePart:
        """Return a part with the bytes of an image."""
        return cls(media_type, base64.b64encode(content).decode())

    @property
    def content(self) -> bytes:
        """The bytes of the image."""
        return base64.b64decode(self.data)

    def __str__(self) -> str:
        return f"[image: {self.media_type}, {len(self.data) * 3 // 4 - self.data.count('=', -2):,} bytes]"


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def parts_text(parts: Sequence[TextPart | ImagePart]) -> str:
    """Return the parts as text, for models that do not read images: an image becomes a line with its type and size."""
    return "\n".join(part.text if isinstance(part, TextPart) else str(part) for part in parts)
