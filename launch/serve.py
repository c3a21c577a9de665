"""Talk to a trained model over a websocket: moshi's own web server with the hybrid model in it.

    python launch/serve.py CHECKPOINT [--host 127.0.0.1] [--port 8998] [--static FOLDER]
                                      [--allowed-host NAME[:PORT] …]

CHECKPOINT is what `launch/generate.py` takes. The protocol at /api/chat is moshi's, so its clients
work: `python -m moshi.client --port 8998`, or its web page, whose files --static names; nothing is
downloaded, and without --static there is the websocket alone. One conversation at a time, each
beginning anew: attention caches and TTT's inner networks are reset. Ctrl-C or SIGTERM ends it.

There is no password and no encryption: on another host than loopback, whoever reaches the port can
talk to the model. Web pages from elsewhere are refused: by their Origin, and by their Host where
somebody lets another name lead here. Allowed hosts are localhost, 127.0.0.1, [::1] and --host with
the port, and each --allowed-host: what a browser's address bar shows where the server is reached
through a proxy or a tunnel, or listens on all addresses (--host 0.0.0.0).
"""

from __future__ import annotations

import argparse
import asyncio
import re
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn
from urllib.parse import urlsplit

if __name__ == "__main__":
    # Python puts this file's folder first on the path; the packages stand one above.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from aiohttp import WSCloseCode, web
from aiohttp.typedefs import Handler, Middleware

from launch.commands import chosen_device, telling_mistakes
from launch.errors import UserError
from launch.model_source import find_checkpoint, open_source
from launch.talking.moshi_server import server_state_class
from launch.talking.talker import (
    TITLE,
    Talker,
    add_model_arguments,
    load_talker,
    sampling_of,
)

CHAT = "/api/chat"
# For clients that are still waiting for their turn.
SHUTDOWN_SECONDS = 1.0
HTTP_PORT = 80  # left out of a Host
PORT_OF_HOST = re.compile(r":\d+$")


def make_app(
    talker: Talker, sampling: dict[str, Any], static: Path | None, hosts: Collection[str]
) -> web.Application:
    """moshi's server for `talker`: its conversation at /api/chat, and its web page if given.

    Args:
        sampling: LMGen's arguments.
        static: a folder with the web page, `index.html` and what it asks for.
        hosts: `allowed_hosts`.
    """
    device = next(talker.model.parameters()).device
    state = server_state_class()(
        talker.release.model_type,
        talker.codec.mimi,
        talker.codec.tokenizer,
        talker.model,
        cfg_coef=1.0,
        device=device,
        **sampling,
    )
    conversations = _Conversations(state.recv_loop)
    state.recv_loop = conversations.hold
    if device.type == "cuda":
        state.warmup()  # records CUDA graphs, and waits for the GPU; a CPU has nothing to record
    app = web.Application(middlewares=[own_pages_only(hosts)])
    app.on_shutdown.append(conversations.end)
    app.router.add_get(CHAT, state.handle_chat)
    if static is not None:
        index = static / "index.html"

        async def root(_: web.Request) -> web.FileResponse:
            return web.FileResponse(index)

        app.router.add_get("/", root)
        app.router.add_static("/", static)
    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket that clients can connect to; they wait until it is served.

    Raises:
        UserError: the port is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host, --port: can't listen on {host}, port {port}: {error.strerror or error}; end "
            "what uses that port, or name another one"
        ) from error


async def serve_until_stopped(app: web.Application, opened: socket.socket) -> None:
    """Serve `app` on `opened` until SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS)
    await runner.setup()
    try:
        await web.SockSite(runner, opened).start()
        host, port = opened.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving: ws://{shown}:{port}{CHAT}", flush=True)
        await stopped.wait()
        print("ending: no conversation is taken up any more", flush=True)
    finally:
        await runner.cleanup()


class _Conversations:
    """moshi's loop over a client's messages: told in a line where it breaks off, and ended with the
    server."""

    def __init__(self, receive: Callable[..., Awaitable[None]]) -> None:
        self._receive = receive
        self._open: set[web.WebSocketResponse] = set()

    async def hold(self, ws: web.WebSocketResponse, *streams: Any) -> None:
        self._open.add(ws)
        try:
            await self._receive(ws, *streams)
        except ConnectionResetError:
            print("conversation ended: the client left in the middle of an answer", flush=True)
        except ValueError as error:
            print(f"conversation ended: the client sent no Ogg Opus audio: {error}", flush=True)
            await ws.close(code=WSCloseCode.UNSUPPORTED_DATA, message=b"no Ogg Opus audio")
        finally:
            self._open.discard(ws)

    async def end(self, _: web.Application) -> None:
        for ws in list(self._open):
            await ws.close(code=WSCloseCode.GOING_AWAY, message=b"the server ends")


def allowed_hosts(host: str, port: int, named: Sequence[str]) -> tuple[str, ...]:
    """What a request's Host may be; a name without a port stands for all of its ports.

    Args:
        host, port: listened on.
        named: further ones, as --allowed-host takes them.
    """
    suffix = "" if port == HTTP_PORT else f":{port}"
    own = [f"{_in_url(name)}{suffix}" for name in ("localhost", "127.0.0.1", "::1", host)]
    return tuple(dict.fromkeys([*own, *map(_in_url, named)]))


def _in_url(host: str) -> str:
    """`host` as browsers write it: in small letters, an IPv6 address in brackets."""
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return host.lower()
    return f"[{address}]" if address.version == 6 else str(address)


def own_pages_only(hosts: Collection[str]) -> Middleware:
    """Refuse requests of other servers' pages, and all whose Host isn't one of `hosts`.

    Browsers let any page connect to any host's websocket, and say which page it is. But whoever
    owns a name can let it lead here (DNS rebinding), and then its pages' Origin is their Host.
    """

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "").lower()
        if host not in hosts and PORT_OF_HOST.sub("", host) not in hosts:
            raise web.HTTPForbidden(
                text=f"Host: found {host}, allowed: {', '.join(hosts)}; if that name is "
                "this server's, start it with --allowed-host and that name\n"
            )
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host:
            raise web.HTTPForbidden(text="only pages that this server serves may talk to it\n")
        return await handler(request)

    return middleware


def serve(arguments: argparse.Namespace) -> None:
    """The whole command, once its arguments are read."""
    problems = []
    device, static = chosen_device(arguments.device), arguments.static
    if static is not None and not (static / "index.html").is_file():
        problems.append(f"--static: {static} holds no index.html; name the folder of a web page")
    try:
        folder, checkpoint = find_checkpoint(arguments.checkpoint.absolute(), arguments.step)
    except UserError as error:
        problems += error.problems
    try:
        opened = listen(arguments.host, arguments.port)
    except UserError as error:
        problems += error.problems
    if problems:
        raise UserError(problems)
    with opened, torch.no_grad():
        talker = load_talker(open_source(folder, checkpoint, device))
        for line in talker.lines:
            print(line)
        if static is None:
            print("web page: none; the websocket alone is served (--static names a page's folder)")
        else:
            print(f"web page: {static}")
        if not is_loopback(arguments.host):
            print(
                f"warning: {arguments.host} is no loopback address: whoever reaches it can talk to "
                "the model, unencrypted and without a password"
            )
        torch.manual_seed(arguments.seed)
        hosts = allowed_hosts(arguments.host, opened.getsockname()[1], arguments.allowed_host)
        print(f"answers as: {', '.join(hosts)} (--allowed-host adds names)")
        app = make_app(talker, sampling_of(arguments, talker.release), static, hosts)
        asyncio.run(serve_until_stopped(app, opened))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on `host`, an address or a name."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"found {text}, allowed: 1 to 65535, or 0 for a free one")
    return value


def _host(text: str) -> str:
    if not re.fullmatch(r"[^\s/@]+", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a name, or name:port")
    return text


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End a server that isn't serving yet as one that is."""
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/serve.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=_port, default=8998, help="(default 8998; 0: a free one)")
    parser.add_argument(
        "--allowed-host",
        type=_host,
        action="append",
        default=[],
        metavar="NAME[:PORT]",
        help="answer under this name too (any port unless one is named); may be given repeatedly",
    )
    parser.add_argument("--static", type=Path, metavar="FOLDER", help="a web page's files")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, at the start (default 0)")
    return parser


def main(command_line: Sequence[str]) -> None:
    """Run the command; a person's mistake ends it with exit code 2 and one message."""
    arguments = _parser().parse_args(command_line)
    with telling_mistakes(TITLE):
        serve(arguments)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    main(sys.argv[1:])
