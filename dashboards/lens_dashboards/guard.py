"""Whom the dashboard answers, and what it does not take: foreign hosts, no token, bodies that make no sense."""

import hmac
import logging
import socket
from collections.abc import Callable, Iterable
from functools import wraps
from ipaddress import ip_address
from typing import Any
from urllib.parse import quote, urlsplit

import psutil
from dash.exceptions import PreventUpdate
from flask import Flask, Response, abort, redirect, request
from werkzeug.exceptions import HTTPException

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LARGEST_BODY = 16 << 20
"""Bytes of a request: the file of a circuit is the largest that a page sends."""
_LOG = logging.getLogger(__name__)
_ANYWHERE = ("", "0.0.0.0", "::")  # binds every address of this machine
_CALLBACKS, _FILES = "/_dash-update-component", "/_dash-component-suites"
_COOKIE = "lens_token"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def names_of(host: str) -> tuple[str, ...]:
    """Names under which a server that listens on `host` may be asked for."""
    if is_loopback(host):
        return (*LOOPBACK, host)
    own = (*LOOPBACK, host, socket.gethostname(), socket.getfqdn())
    if host not in _ANYWHERE:
        return own
    listed = (address for kind in psutil.net_if_addrs().values() for address in kind)
    internet = (socket.AF_INET, socket.AF_INET6)
    return (*own, *(one.address.partition("%")[0] for one in listed if one.family in internet))


def answer_only(flask: Flask, hosts: Iterable[str]) -> None:
    """Refuse (400) what asks for another host: a page of another site whose name leads here."""
    known = {_plain(host) for host in hosts}

    @flask.before_request
    def check_host() -> None:
        try:
            name = urlsplit(f"//{request.headers.get('Host', '')}").hostname or ""
        except ValueError:
            name = ""
        if _plain(name) not in known:
            abort(400, "this dashboard is not asked for by this name")


def ask_for_token(flask: Flask, token: str) -> None:
    """Refuse (403) who does not bring the token; `?token=` brings it once, and leaves the link."""

    @flask.before_request
    def check_token() -> Response | None:
        given = request.args.get("token") or request.cookies.get(_COOKIE, "")
        if not hmac.compare_digest(given.encode(), token.encode()):
            abort(403, "this dashboard needs its token: open it with ?token=...")
        if "token" not in request.args:
            return None
        answer = redirect(_without_token())
        answer.set_cookie(_COOKIE, token, httponly=True, samesite="Strict")
        return answer  # pyright: ignore[reportReturnType]


def refuse_nonsense(flask: Flask) -> None:
    """Refuse what no page of ours asks Dash for: callbacks (400), its files (404), a large body (413)."""
    flask.config["MAX_CONTENT_LENGTH"] = LARGEST_BODY
    for name, view in flask.view_functions.items():
        if name.startswith(_CALLBACKS):
            flask.view_functions[name] = _or_refused(view, 400, "this callback makes no sense")
        elif name.startswith(_FILES):
            flask.view_functions[name] = _or_refused(view, 404, "there is no such file")


def _or_refused(view: Callable[..., Any], code: int, reason: str) -> Callable[..., Any]:
    @wraps(view)
    def checked(*given: Any, **named: Any) -> Any:
        try:
            return view(*given, **named)
        except (HTTPException, PreventUpdate):
            raise
        except Exception as error:
            _LOG.debug("refused what was asked of Dash", exc_info=error)
            abort(code, reason)

    return checked


def _without_token() -> str:
    """The link that was asked for, its query but for the token, on this very host."""
    parts = request.query_string.decode("latin-1").split("&")
    query = "&".join(part for part in parts if part.partition("=")[0] != "token")
    return quote("/" + request.path.lstrip("/")) + (f"?{query}" if query else "")


def _plain(host: str) -> str:
    """A name or address in the one way in which it is compared."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        return ip_address(name).compressed
    except ValueError:
        return name
