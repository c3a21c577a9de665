"""`launch/serve.py` without a model: mistakes, who may talk to it, and moshi's class by itself."""

import asyncio

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from launch.serve import allowed_hosts, is_loopback, main, own_pages_only
from launch.talking.moshi_server import server_state_class
from tests.ranks import REPO


def test_moshis_server_state_comes_without_its_server():
    found = server_state_class()
    assert found.__name__ == "ServerState"
    assert found.__module__ == "moshi.server"
    assert callable(found.handle_chat)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.7", "example.org", ""])
def test_elsewhere(host):
    assert not is_loopback(host)


def test_mistakes_are_told_together(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--static", str(REPO)])
    assert stop.value.code == 2
    head, page, checkpoint = capsys.readouterr().err.splitlines()
    assert head == "Can't talk: 2 problems."
    assert f"--static: {REPO} holds no index.html" in page
    assert "CHECKPOINT: " in checkpoint
    for port in ("65536", "-1", "web"):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path), "--port", port])
        assert stop.value.code == 2


@pytest.mark.parametrize(
    ("host", "port", "named", "hosts"),
    [
        ("127.0.0.1", 8998, [], "localhost:8998 127.0.0.1:8998 [::1]:8998"),
        ("0:0::1", 80, [], "localhost 127.0.0.1 [::1]"),
        (
            "Box.lan",
            1,
            ["A.org", "fe80::7"],
            "localhost:1 127.0.0.1:1 [::1]:1 box.lan:1 a.org [fe80::7]",
        ),
    ],
)
def test_allowed_hosts(host, port, named, hosts):
    assert allowed_hosts(host, port, named) == tuple(hosts.split())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8998"}, 200),
        ({"Host": "[::1]:8998"}, 200),
        ({"Host": "LOCALHOST:8998", "Origin": "http://localhost:8998"}, 200),
        ({"Host": "box.lan", "Origin": "https://box.lan"}, 200),
        ({"Host": "box.lan:9"}, 200),
        ({"Host": "talk.org:9"}, 200),
        ({"Host": "talk.org"}, 403),
        ({"Host": "localhost:9"}, 403),
        ({"Host": "localhost:8998", "Origin": "http://else.where"}, 403),
        ({"Host": "localhost:8998", "Origin": "null"}, 403),
        # A page of a name that was made to lead here: its Origin is its Host.
        ({"Host": "else.where:8998", "Origin": "http://else.where:8998"}, 403),
        ({"Host": "localhost.else.where:8998"}, 403),
        ({"Host": "else.where@localhost:8998"}, 403),
        ({"Host": ""}, 403),
    ],
)
def test_who_may_talk_to_the_server(headers, status):
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text="welcome")

    async def ask() -> tuple[int, str]:
        hosts = allowed_hosts("127.0.0.1", 8998, ["box.lan", "talk.org:9"])
        app = web.Application(middlewares=[own_pages_only(hosts)])
        app.router.add_get("/", answer)
        async with TestClient(TestServer(app)) as client:
            response = await client.get("/", headers=headers)
            return response.status, await response.text()

    found, text = asyncio.run(ask())
    assert found == status, text
    if status == 403 and "Origin" not in headers:
        assert text.startswith(f"Host: found {headers['Host']}, allowed: localhost:8998, ")
        assert "--allowed-host" in text


@pytest.mark.parametrize("name", ["http://box.lan", "box.lan/talk", ""])
def test_an_allowed_host_is_a_name(name, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--allowed-host", name])
    assert stop.value.code == 2
    assert "--allowed-host" in capsys.readouterr().err
