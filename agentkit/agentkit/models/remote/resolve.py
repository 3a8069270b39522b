"""Names of models behind an API, such as `openai:gpt-5`, and the client that speaks to each."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from agentkit.errors import ApiKeyError, ModelOptionError, UnknownModelError
from agentkit.models.remote.provider import Provider

PROVIDERS: Final = {
    "openai": "https://api.openai.com/v1",
    "anthropic": "https://api.anthropic.com",
    "deepseek": "https://api.deepseek.com",
}
"""The base URL of each provider. `openai` also stands for every other server that speaks its protocol."""

NO_KEY: Final = "no-key-is-set"
"""Sent to servers that need no key and ignore it, because the SDKs require one."""

_PATHS: Final = re.compile(r"/*((?<!/)/(chat/completions|responses|messages)/*)?$")
"""Paths of the APIs. Users often give a base URL that ends in one of them."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model and how to reach it. `timeout_s` is the number of seconds without data after which a request fails."""

    provider: str
    model: str
    base_url: str
    api_key: str | None = field(repr=False)
    timeout_s: float

    @property
    def host(self) -> str:
        """The host, with its port if the URL has one."""
        return urlsplit(self.base_url).netloc

    @property
    def billing_host(self) -> str:
        """The host whose list prices apply. With `openai:` it is the host of the URL, which may be any server. With the
        other providers it is the provider's own host, even if the URL names a gateway."""
        return self.host if self.provider == "openai" else urlsplit(PROVIDERS[self.provider]).netloc


def is_remote(name: str) -> bool:
    """Return whether `name` is `PROVIDER:MODEL`. A folder of that name takes precedence."""
    provider, colon, model = name.partition(":")
    return bool(colon) and provider in PROVIDERS and bool(model) and not Path(name).is_dir()


def key_variable(provider: str) -> str:
    """Return the environment variable with the provider's key."""
    return f"{provider.upper()}_API_KEY"


def endpoint_of(name: str, *, base_url: str | None, api_key: str | None, timeout_s: float) -> Endpoint:
    """Return the endpoint of `PROVIDER:MODEL`. URL and key come from the environment unless they are given.

    Raises:
        UnknownModelError: the name is not `PROVIDER:MODEL` with one of `PROVIDERS`.
        ModelOptionError: the base URL is not a URL, or contains a user name.
        ApiKeyError: there is no key, and the URL is the provider's own.
    """
    provider, _, model = name.partition(":")
    if provider not in PROVIDERS or not model.strip():
        raise UnknownModelError(
            f"{name!r} is not the name of a model behind an API: expected PROVIDER:MODEL, with the provider "
            f"{', '.join(PROVIDERS)}; use openai: with a base URL for any server that speaks its protocol"
        )
    base_url = base_url or os.environ.get(f"{provider.upper()}_BASE_URL") or PROVIDERS[provider]
    base_url = _PATHS.sub("", base_url)
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ModelOptionError(f"the base URL {base_url!r} is not a URL; expected one such as http://localhost:8000/v1")
    if parts.username is not None:
        raise ModelOptionError(
            f"the base URL of {parts.hostname} contains a user name; give the key in {key_variable(provider)}"
        )
    key = api_key or os.environ.get(key_variable(provider)) or None
    if key is None and parts.hostname == urlsplit(PROVIDERS[provider]).hostname:
        raise ApiKeyError(
            f"there is no key for {parts.hostname}: set the environment variable {key_variable(provider)}, or give the "
            "base URL of another server"
        )
    return Endpoint(provider, model, base_url, key, timeout_s)


def opener(endpoint: Endpoint) -> Callable[[], Provider]:
    """Return a function that opens a client of the endpoint's API; its clients share what they learn about the server.

    Raises:
        MissingDependencyError: the API's package is not installed.
    """
    settings: dict[str, Any] = {
        "base_url": endpoint.base_url,
        "api_key": endpoint.api_key or NO_KEY,
        "timeout_s": endpoint.timeout_s,
    }
    if endpoint.provider == "anthropic":
        from agentkit.models.remote.anthropic import Anthropic

        messages = Anthropic(endpoint.model, **settings)
        return lambda: Anthropic(endpoint.model, **settings, like=messages)
    if endpoint.provider == "openai" and urlsplit(endpoint.base_url).hostname == "api.openai.com":
        from agentkit.models.remote.openai_responses import OpenAIResponses

        responses = OpenAIResponses(endpoint.model, **settings)
        return lambda: OpenAIResponses(endpoint.model, **settings, like=responses)
    from agentkit.models.remote.openai_chat import OpenAIChat, Server

    server = Server()
    return lambda: OpenAIChat(endpoint, server)
