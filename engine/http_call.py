"""One call from the command line to a running server, and what went wrong with it in one sentence."""

from __future__ import annotations

import urllib.error
import urllib.request

import orjson

from kvcache.errors import TwinpoolError, UnavailableError

TIMEOUT_S = 10.0


def base_url(url: str) -> str:
    """
    Raises:
        TwinpoolError: it is no http address.
    """
    if "://" not in url:
        url = f"http://{url}"
    if not url.startswith(("http://", "https://")):
        raise TwinpoolError(f"{url!r} is no http address.")
    return url.rstrip("/")


def call_server(address: str, key: str | None, body: bytes | None = None) -> bytes:
    """GET, or POST with a body of JSON.

    Raises:
        UnavailableError: nobody answers at ``address``.
        TwinpoolError: it refuses; says why.
    """
    request = urllib.request.Request(address, data=body)
    if body is not None:
        request.add_header("Content-Type", "application/json")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            answer: bytes = response.read()
    except urllib.error.HTTPError as error:
        raise TwinpoolError(_refusal(address, error)) from None
    except (urllib.error.URLError, OSError) as error:
        raise UnavailableError(f"Nobody answers at {address} ({getattr(error, 'reason', error)}).") from None
    return answer


def _refusal(address: str, error: urllib.error.HTTPError) -> str:
    if error.code == 401:
        option = "--admin-key" if "/admin/" in address else "--api-key"
        return f"{address} answered 401 {error.reason}; give the server's key with {option}."
    try:
        message = str(orjson.loads(error.read())["error"]["message"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return f"{address} answered {error.code} {error.reason}."
    return f"Refused: {message}."
