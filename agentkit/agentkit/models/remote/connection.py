"""The connection to an API through its SDK: the key, the event stream, and the conversion of the SDK's errors.

The SDKs of OpenAI and Anthropic have the same structure, so one class serves both. It reads events as JSON objects, so
that they can be sent back unchanged. It never follows a redirect, because that would send the key to another host.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import os
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import fields
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import anyio

from agentkit.errors import (
    ApiError,
    ApiKeyError,
    ContextFullError,
    MissingDependencyError,
    ModelOptionError,
    UnknownModelError,
)
from agentkit.models.remote.provider import TransientError, TurnRequest
from agentkit_engine.sampling_params import SamplingParams

Sdk = Literal["openai", "anthropic"]

TIMEOUT_S: Final = 600.0
"""Default number of seconds without data after which a request fails."""
CONNECT_TIMEOUT_S: Final = 15.0
DRAIN_S: Final = 1.0
MIN_SECRET: Final = 8
"""Minimum length of a key that is redacted from messages. A shorter key is a placeholder for a server without keys."""
MAX_DETAIL: Final = 500

CALL_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")

KEY_ERRORS: Final = {"authentication_error", "invalid_api_key"}
MODEL_ERRORS: Final = {"model_not_found"}
CONTEXT_ERRORS: Final = {"context_length_exceeded", "request_too_large"}
CONTEXT_TEXTS: Final = ("prompt is too long", "exceed context limit", "exceeds the context window", "context length")
FINAL_ERRORS: Final = {"insufficient_quota", "billing_error", "billing_hard_limit_reached"}
"""Permanent errors, although their HTTP status says that a retry may help."""
TRANSIENT_ERRORS: Final = {
    "api_error",
    "overloaded_error",
    "rate_limit_error",
    "rate_limit_exceeded",
    "server_error",
    "timeout_error",
    "vector_store_timeout",
}
"""Transient errors inside a stream, where errors have no HTTP status."""
NO_API: Final = {404, 405, 501, 505}
"""HTTP statuses of a server that does not know the path or the method."""


class Connection:
    """A connection to one API, with one key, for one model. It opens with the first request and reopens after `aclose`.

    Args:
        sdk: The SDK that speaks to the API.
        model: The model's name, for error messages.
        base_url: The URL that the API's paths are appended to.
        api_key: The key; None reads the environment variable `variable`.
        timeout_s: Seconds without data from the API after which a request fails.

    Raises:
        MissingDependencyError: the SDK is not installed.
        ApiKeyError: there is no key, or it contains characters that no key has.
        ValueError: `base_url` is not an HTTP URL.
    """

    def __init__(
        self, sdk: Sdk, *, model: str, base_url: str, api_key: str | None, variable: str, timeout_s: float
    ) -> None:
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname or url.username is not None:
            raise ValueError(f"base_url must be an http or https URL without a user name, got {base_url!r}")
        self.model = model
        self.host = url.netloc
        self._base_url = base_url
        self._variable = variable
        self._key = _checked_key(api_key, variable)
        self._timeout_s = timeout_s
        self._sdk = _imported(sdk)
        self._clients: dict[asyncio.AbstractEventLoop, Any] = {}

    async def events(
        self, path: str, body: Mapping[str, Any], headers: Mapping[str, str] | None = None
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Post the request and yield the events of the response. Closing the generator closes the connection.

        Raises:
            TransientError, ContextFullError, ApiKeyError, UnknownModelError, ApiError: see `Provider.stream`.
        """
        import httpx2

        sdk = self._sdk
        sent = _encodable(body)
        stream: Any = None
        try:
            stream = await self._client().post(
                path,
                cast_to=object,
                body=sent,
                options={"headers": dict(headers or {})},
                stream=True,
                stream_cls=sdk.AsyncStream[object],
            )
            async with stream:
                await self._refuse_other_content(stream.response)
                async for event in stream:
                    if not isinstance(event, dict):
                        raise TransientError(f"{self.host} sent an event that is not a JSON object")
                    yield event
        except sdk.APITimeoutError as error:
            raise TransientError(f"{self.host} sent nothing for {self._timeout_s:g} s") from error
        except sdk.APIStatusError as error:
            raise self._status_failure(error) from None  # its text may quote the key
        except sdk.APIConnectionError as error:
            what = f"no connection to {self.host}" if stream is None else f"the stream of {self.host} broke"
            raise TransientError(self._redacted(f"{what}: {str(error.__cause__ or error).rstrip('.')}")) from None
        except sdk.APIError as error:  # an error event of a stream
            raise self.failure(error.message, kinds=_kinds(error.body)) from None
        except httpx2.TimeoutException as error:
            raise TransientError(f"{self.host} sent nothing for {self._timeout_s:g} s") from error
        except httpx2.HTTPError as error:
            raise TransientError(self._redacted(f"the stream of {self.host} broke: {error}")) from error
        except ValueError as error:
            raise TransientError(f"{self.host} sent an event that is not JSON") from error

    def failure(
        self,
        detail: str,
        *,
        kinds: frozenset[str],
        status: int | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
    ) -> Exception:
        """Return the exception for an error that the API reports; `kinds` are its codes and types."""
        where = f"{self.host}: HTTP {status}" if status is not None else self.host
        request = f" (request {request_id})" if request_id else ""
        text = self._redacted(f"{where}: {' '.join(detail.split())[:MAX_DETAIL]}{request}")
        too_long = status in (None, 400, 422) and any(part in detail.lower() for part in CONTEXT_TEXTS)
        if too_long or kinds & CONTEXT_ERRORS or status == 413:
            return ContextFullError(text)
        if kinds & FINAL_ERRORS or status == 402:
            return ApiError(text, status=status)
        if status == 403 or "permission_error" in kinds:
            return ApiKeyError(f"{text}: check {self._variable}, and that the key may use {self.model}", status=status)
        if kinds & KEY_ERRORS or status == 401:  # the API's own message may contain a part of the key
            return ApiKeyError(f"{self.host} refuses the key{request}: check {self._variable}", status=status)
        if kinds & MODEL_ERRORS or (status == 404 and "not_found_error" in kinds):
            return UnknownModelError(f"{self.host} has no model {self.model!r}{request}: check the name")
        if status in NO_API or (status is not None and 300 <= status < 400):
            hint = ", which usually ends in /v1" if self._lacks_path else ""
            return ApiError(f"{text}: check the base URL {self._base_url}{hint}", status=status)
        transient = status in (408, 409, 429) or status >= 500 if status is not None else bool(kinds & TRANSIENT_ERRORS)
        if transient:
            return TransientError(text, retry_after_s=retry_after_s, status=status)
        return ApiError(text, status=status)

    def incomplete(self) -> TransientError:
        """Return the exception for a stream that ended before its last event."""
        return TransientError(f"{self.host} ended the stream before its last event")

    def empty(self) -> ApiError:
        """Return the exception for a stream without an event."""
        return ApiError(f"{self.host} sent an empty stream: {self._not_an_api}", status=200)

    def malformed(self, event: Mapping[str, Any]) -> TransientError:
        """Return the exception for an event that does not have the form of its type."""
        return TransientError(f"{self.host} sent a malformed event of type {event.get('type')!r:.80}")

    async def aclose(self) -> None:
        """Close the connections that were opened on the current event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _client(self) -> Any:
        """Return the client of the current event loop, because connections cannot move to another loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            import httpx2

            sdk = self._sdk
            timeout = httpx2.Timeout(self._timeout_s, connect=min(CONNECT_TIMEOUT_S, self._timeout_s))
            make = sdk.AsyncOpenAI if sdk.__name__ == "openai" else sdk.AsyncAnthropic
            self._clients[loop] = make(
                api_key=self._key,
                base_url=self._base_url,
                max_retries=0,
                timeout=timeout,
                http_client=sdk.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout),
            )
        return self._clients[loop]

    async def _refuse_other_content(self, response: Any) -> None:
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type in ("text/event-stream", "application/octet-stream", "text/plain"):
            return
        given = content_type or "no content type"
        raise ApiError(
            f"{self.host} sent {given} instead of an event stream: {self._not_an_api}", status=response.status_code
        )

    @property
    def _lacks_path(self) -> bool:
        return self._sdk.__name__ == "openai" and not urlsplit(self._base_url).path

    @property
    def _not_an_api(self) -> str:
        kind = "an OpenAI" if self._sdk.__name__ == "openai" else "an Anthropic"
        return f"{self._base_url} is not the base URL of {kind}-compatible API"

    def _status_failure(self, error: Any) -> Exception:
        body = error.body
        status = error.status_code if error.status_code != 200 else None  # an error event of Anthropic's stream
        detail = _message(body) or f"{error.response.reason_phrase}, without an error message"
        return self.failure(
            detail,
            kinds=_kinds(body),
            status=status,
            retry_after_s=retry_after_s(error.response.headers),
            request_id=error.request_id or (body.get("request_id") if isinstance(body, dict) else None),
        )

    def _redacted(self, text: str) -> str:
        return text.replace(self._key, "[key]") if len(self._key) >= MIN_SECRET else text


async def drain(events: AsyncGenerator[dict[str, Any], None]) -> None:
    """Read the rest of a stream after its last event, so that the connection can be reused."""
    with suppress(TransientError), anyio.move_on_after(DRAIN_S):
        async for _ in events:
            pass


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the seconds to wait that the headers of a response ask for; None if they ask for none."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return max(0.0, float(headers[name]) * unit_s)
        except (KeyError, ValueError):
            continue
    try:
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time())
    except (KeyError, ValueError):
        return None


def wire_id(call_id: str) -> str:
    """Return the id of a call in the form that every API accepts. An id that an API made is returned unchanged."""
    return call_id if CALL_ID.fullmatch(call_id) else f"call_{hashlib.sha256(call_id.encode()).hexdigest()[:24]}"


def turn_limit(request: TurnRequest) -> int | None:
    """Return the maximum number of tokens of the turn; None without a limit."""
    given = [limit for limit in (request.max_tokens, request.sampling.max_tokens) if limit is not None]
    return min(given, default=None)


def refuse_sampling(sampling: SamplingParams, owner: str, *, has: frozenset[str]) -> None:
    """Refuse sampling parameters that an API does not have. A seed is ignored, because it only makes draws repeatable.

    Args:
        sampling: The parameters.
        owner: The model or API, for the error message.
        has: Names of the parameters that the API has.

    Raises:
        ModelOptionError: another parameter differs from its default.
    """
    free = has | {"seed", "max_tokens", "output_schema", "grammar"}
    default = SamplingParams()
    given = [
        field.name
        for field in fields(sampling)
        if field.name not in free and getattr(sampling, field.name) != getattr(default, field.name)
    ]
    if given:
        raise ModelOptionError(f"{owner} has no {', '.join(given)}: leave it out")


def _checked_key(api_key: str | None, variable: str) -> str:
    key = (os.environ.get(variable, "") if api_key is None else api_key).strip()
    if not key:
        raise ApiKeyError(f"there is no key: set {variable}, or pass api_key")
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ApiKeyError(f"the key has characters that no key has: check {variable}")
    return key


def _imported(sdk: Sdk) -> Any:
    try:
        return importlib.import_module(sdk)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f'the {sdk} package is missing: pip install "agentkit-harness[api]"') from error


def _encodable(value: Any) -> Any:
    """Return the JSON value with lone surrogates, which UTF-8 does not have, replaced by "?"."""
    match value:
        case str():
            return value if value.isascii() else value.encode("utf-8", "replace").decode()
        case Mapping():
            return {_encodable(key): _encodable(item) for key, item in value.items()}
        case list() | tuple():
            return [_encodable(item) for item in value]
    return value


def _error(body: object) -> object:
    """Return the error object in the body of a response, which OpenAI's SDK has already taken out."""
    return body["error"] if isinstance(body, dict) and isinstance(body.get("error"), dict | str) else body


def _message(body: object) -> str | None:
    match _error(body):
        case {"message": str(message)} | str(message) if message and not message.lstrip().startswith("<"):
            return message
        case {"detail": str(detail)}:
            return detail
    return None


def _kinds(body: object) -> frozenset[str]:
    error = _error(body)
    if not isinstance(error, dict):
        return frozenset()
    return frozenset(kind for kind in (error.get("code"), error.get("type")) if isinstance(kind, str))
