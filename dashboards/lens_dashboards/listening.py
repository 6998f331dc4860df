"""The socket of the dashboard, and a server that a connection without a request cannot hold up."""

import logging
import socket
from contextlib import suppress
from typing import Any

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.server import TcpWSGIServer

from lens.common.errors import LensError
from lens_dashboards.guard import LARGEST_BODY

PATIENCE = 20
"""Seconds that a connection may take for one request, or be idle."""
_CONNECTIONS = 1000  # files of this process allowing
_OTHER_FILES = 100


def listen(host: str, port: int) -> socket.socket:
    """A bound socket.

    Raises:
        LensError: the port or the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise LensError(
            f"port {port} on {host} cannot be used ({reason}); choose another with --port"
        ) from error
    return listener


def make_server(application: Any, listener: socket.socket, threads: int) -> Any:
    """A waitress server of a WSGI application on a bound socket, to be run."""
    # A page asks for many files at once, which waitress warns of.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    how = Adjustments(
        sockets=[listener],
        threads=threads,
        ident="",
        channel_timeout=PATIENCE,
        cleanup_interval=1,
        connection_limit=_most_connections(),
        asyncore_use_poll=True,  # select() knows 1,024 files
        max_request_body_size=LARGEST_BODY,
    )
    kind, address = listener.type, listener.getsockname()
    where = (listener.family, kind, listener.proto, address)
    return _Server(application, _sock=listener, adj=how, sockinfo=where, bind_socket=False)


class _Parser(HTTPRequestParser):
    """Refuses (400) an address that cannot be taken apart, and waits for no body that was not announced."""

    def parse_header(self, header_plus: bytes) -> None:
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # of urllib, on [::1 and the like
            raise ParsingError(f"this is no address: {error}") from error
        if not self.chunked and not self.content_length:
            self.expect_continue = False


class _Channel(HTTPChannel):
    """A connection whose time does not start anew with every byte of an unfinished request."""

    parser_class = _Parser
    _since = 0.0

    @property
    def last_activity(self) -> float:
        return self._since

    @last_activity.setter
    def last_activity(self, now: float) -> None:
        if self.request is None:
            self._since = now


class _Server(TcpWSGIServer):
    """Closes who has waited longest where there are too many, so that others are answered."""

    channel_class = _Channel

    def readable(self) -> bool:
        channels: Any = self.active_channels
        staying = [one for one in channels.values() if not one.will_close]
        if len(staying) >= self.adj.connection_limit - 10:  # the loop watches some other files too
            waiting = [one for one in staying if not one.requests]
            if waiting:  # closed by the loop: its file may be taken by another one only after that
                min(waiting, key=lambda one: one.creation_time).will_close = True
        return super().readable()


def _most_connections() -> int:
    with suppress(ImportError):
        import resource

        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY:
            return max(50, min(_CONNECTIONS, files - _OTHER_FILES))
    return _CONNECTIONS
