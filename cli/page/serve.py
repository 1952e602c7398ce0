"""Serving the page: its socket, its token, and what it says when it starts."""

import os
import secrets
import socket
from dataclasses import replace

import uvicorn

from mergemill.cli import console
from mergemill.cli.page.app import make_app
from mergemill.cli.page.gate import LEAST_TOKEN, Address, is_loopback
from mergemill.cli.page.settings import Setup
from mergemill.engine import errors

EVERYWHERE = ("0.0.0.0", "::")  # hosts that are no names
TOKEN = "MERGEMILL_UI_TOKEN"  # the variable of a token of one's own


def serve(setup: Setup, address: Address) -> None:
    """Serve until the process is asked to end; runs go on. `InputError` for a host without a token of one's own."""
    token = take_token(address)
    with open_socket(address) as listener:
        address = replace(address, port=listener.getsockname()[1])
        os.chdir(setup.root)
        for line in say_address(setup, address, token):
            console.say(line)
        console.flush()
        app = make_app(setup, address, token)
        config = uvicorn.Config(
            app, log_level="error", access_log=False, server_header=False, proxy_headers=False, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listener])


def take_token(address: Address) -> str:
    """Return the token, one's own or a new one; it is taken out of the environment, which runs inherit."""
    own = os.environ.pop(TOKEN, "")
    if own and len(own) < LEAST_TOKEN:
        raise errors.InputError(f"{TOKEN}: has {len(own)} characters; {LEAST_TOKEN} are the least")
    if address.host in EVERYWHERE and not address.url:
        raise errors.InputError(
            f"--host {address.host}: listens everywhere; say with --url by which address browsers reach the page"
        )
    if not own and not is_loopback(address.host):
        raise errors.InputError(
            f"--host {address.host}: others reach that, so the page wants a token of your own in the variable {TOKEN}, "
            'such as that of: python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return own or secrets.token_urlsafe(24)


def open_socket(address: Address) -> socket.socket:
    """Return a socket that listens; `InputError` where that cannot be."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address.host, address.port))
        listener.listen()  # so that who opens the address at once waits, and is not refused
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or str(error)
        raise errors.InputError(f"{address.host}:{address.port}: {why}; --port chooses another") from None
    return listener


def say_address(setup: Setup, address: Address, token: str) -> list[str]:
    """Return what is said at the start; a token of one's own is not repeated."""
    host = f"[{address.host}]" if ":" in address.host else address.host
    url = address.url.rstrip("/") or f"http://{host}:{address.port}"
    shown = token if is_loopback(address.host) and not address.url else "YOUR-TOKEN"
    return [f"models and merges below {setup.root}", f"{url}/#token={shown}"]
