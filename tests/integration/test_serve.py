"""`launch/serve.py` as a client of moshi's meets it: over its websocket, with the demo's model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import numpy as np
import pytest
import sphn

from launch.serve import main
from tests.ranks import REPO, kill_job, start_command
from tests.unit.release_cases import write_ttt_release
from ttt_dist.data.audio import FRAME_SAMPLES, SAMPLE_RATE

pytestmark = pytest.mark.integration
SERVE = REPO / "launch" / "serve.py"
FRAMES = 20
PAGE = "<title>a page</title>"
NAME = "box.lan"
AUDIO, TEXT = 1, 2  # the first byte of moshi's messages; 0 is the handshake
SECONDS = 60.0  # for a server to start and for an answer; idle, both take a few


class Server(NamedTuple):
    process: subprocess.Popen[str]
    port: int
    told: list[str]


class Answer(NamedTuple):
    opus: list[bytes]
    samples: np.ndarray
    text: str


@pytest.fixture(scope="module")
def release(demo_base, tmp_path_factory) -> Path:
    """The demo's model with weights that make its likeliest answers depend on what it hears."""
    return write_ttt_release(demo_base, tmp_path_factory.mktemp("release") / "with-ttt")


@pytest.fixture(scope="module")
def server(release, tmp_path_factory) -> Iterator[Server]:
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").write_text(PAGE)
    arguments = [release, "--port", "0", "--temp", "0", "--temp-text", "0", "--static", page]
    arguments += ["--allowed-host", NAME]
    command = [sys.executable, str(SERVE), *map(str, arguments)]
    with start_command(command, cwd=Path("/"), PYTHONUNBUFFERED="1") as process:
        try:
            told = []
            assert process.stdout is not None
            for line in process.stdout:
                told.append(line.strip())
                if line.startswith("serving: "):
                    break
            assert told[-1].startswith("serving: "), process.communicate()
            yield Server(process, int(told[-1].split("/")[2].split(":")[1]), told)
        finally:
            kill_job(process)


def user(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 0.1, FRAMES * FRAME_SAMPLES)
    return noise.astype(np.float32)


async def _chat(port: int, samples: np.ndarray, session: aiohttp.ClientSession) -> Answer:
    writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
    opus, heard, text = [], [], ""
    async with session.ws_connect(f"http://127.0.0.1:{port}/api/chat") as socket:
        assert await socket.receive_bytes() == b"\0"
        for frame in samples.reshape(-1, FRAME_SAMPLES):
            if data := writer.append_pcm(frame):
                await socket.send_bytes(bytes([AUDIO]) + data)
        # moshi's server doesn't answer the first frame, and the second is a delay.
        while sum(part.shape[-1] for part in heard) < (FRAMES - 3) * FRAME_SAMPLES:
            kind, *data = await socket.receive_bytes()
            assert kind in (AUDIO, TEXT)
            if kind == TEXT:
                text += bytes(data).decode()
            else:
                opus.append(bytes(data))
                heard.append(reader.append_bytes(bytes(data)))
    return Answer(opus, np.concatenate(heard), text)


def chat(port: int, *users: np.ndarray) -> list[Answer]:
    """Conversations one after the other, as `moshi.client` holds them."""

    async def all_of_them() -> list[Answer]:
        async with aiohttp.ClientSession() as session:
            return [await _chat(port, samples, session) for samples in users]

    return asyncio.run(asyncio.wait_for(all_of_them(), SECONDS))


def test_what_is_served_is_told(server, release):
    assert f"release: {release}" in server.told
    assert "attention context: TTT layers=10 (2 layers), other layers=12 (2 layers)" in server.told
    assert sum(line.startswith("layer ") and "TTT-mlp" in line for line in server.told) == 2
    assert server.told[-1] == f"serving: ws://127.0.0.1:{server.port}/api/chat"
    assert not any("warning" in line for line in server.told)
    own = ", ".join(f"{name}:{server.port}" for name in ("localhost", "127.0.0.1", "[::1]"))
    assert f"answers as: {own}, {NAME} (--allowed-host adds names)" in server.told


def test_each_conversation_begins_anew(server):
    """The same user hears the same after another one's conversation, to the last bit."""
    first, other, again = chat(server.port, user(1), user(2), user(1))
    assert first.samples.std() > 0
    assert len(first.opus) >= FRAMES - 3
    assert first.opus == again.opus
    assert first.text == again.text
    assert first.opus != other.opus
    assert first.text != other.text


def test_a_page_is_served_to_itself_alone(server):
    async def look() -> None:
        url = f"http://127.0.0.1:{server.port}"
        async with aiohttp.ClientSession() as session:
            async with session.get(url) as page:
                assert await page.text() == PAGE
            async with session.ws_connect(f"{url}/api/chat", headers={"Origin": url}) as socket:
                assert await socket.receive_bytes() == b"\0"
            async with session.get(url, headers={"Host": NAME}) as page:
                assert await page.text() == PAGE
            rebound = f"else.where:{server.port}"
            for headers in (
                {"Origin": "http://else.where"},
                {"Host": rebound, "Origin": f"http://{rebound}"},
            ):
                with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                    await session.ws_connect(f"{url}/api/chat", headers=headers)
            async with session.get(url, headers={"Host": rebound}) as page:
                assert page.status == 403

    asyncio.run(asyncio.wait_for(look(), SECONDS))


def send_no_audio(port: int) -> aiohttp.WSMessage:
    """The server's answer."""

    async def send() -> aiohttp.WSMessage:
        url = f"http://127.0.0.1:{port}/api/chat"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            assert await socket.receive_bytes() == b"\0"
            await socket.send_bytes(b"\1no Opus" * 20)
            return await socket.receive()

    return asyncio.run(asyncio.wait_for(send(), SECONDS))


def test_what_is_no_audio_ends_that_conversation_alone(server):
    message = send_no_audio(server.port)
    assert (message.type, message.data) == (aiohttp.WSMsgType.CLOSE, 1003)
    chat(server.port, user(3))


def test_a_port_that_is_taken_is_told(server, release, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(release), "--port", str(server.port)])
    assert stop.value.code == 2
    head, line = capsys.readouterr().err.splitlines()
    assert head == "Can't talk: 1 problem."
    assert f"can't listen on 127.0.0.1, port {server.port}: " in line


def test_sigterm_ends_it_in_the_middle_of_a_conversation(server):
    """The last test here. Exit code 0, nothing left running, no traceback."""

    async def interrupted() -> None:
        url = f"http://127.0.0.1:{server.port}/api/chat"
        async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
            assert await socket.receive_bytes() == b"\0"
            server.process.send_signal(signal.SIGTERM)
            assert (await socket.receive()).type in (
                aiohttp.WSMsgType.CLOSE,
                aiohttp.WSMsgType.CLOSED,
            )

    send_no_audio(server.port)
    asyncio.run(asyncio.wait_for(interrupted(), SECONDS))
    out, err = server.process.communicate(timeout=SECONDS)
    assert server.process.returncode == 0, err
    assert "Traceback" not in out + err
    assert "conversation ended: the client sent no Ogg Opus audio" in out
    with pytest.raises(ProcessLookupError):
        os.killpg(server.process.pid, 0)
