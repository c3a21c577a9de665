"""Talk to a trained model over a websocket: moshi's own web server with the hybrid model in it.

    python launch/serve.py CHECKPOINT [--host 127.0.0.1] [--port 8998] [--static FOLDER]

CHECKPOINT is what `launch/generate.py` takes. The protocol at /api/chat is moshi's, so its clients
work: `python -m moshi.client --port 8998`, or its web page, whose files --static names; nothing is
downloaded, and without --static there is the websocket alone. One conversation at a time, each
beginning anew: attention caches and TTT's inner networks are reset. Ctrl-C or SIGTERM ends it.

There is no password and no encryption: on another host than loopback, whoever reaches the port can
talk to the model. Web pages from elsewhere are refused by their Origin.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence
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


def make_app(talker: Talker, sampling: dict[str, Any], static: Path | None) -> web.Application:
    """moshi's server for `talker`: its conversation at /api/chat, and its web page if given.

    Args:
        sampling: LMGen's arguments.
        static: a folder with the web page, `index.html` and what it asks for.
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
    app = web.Application(middlewares=[_same_origin])
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


@web.middleware
async def _same_origin(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Browsers let any page connect to any host's websocket, and say which page it is."""
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        raise web.HTTPForbidden(text="only pages that this server serves may talk to it\n")
    return await handler(request)


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
        app = make_app(talker, sampling_of(arguments, talker.release), static)
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
