"""`launch/serve.py` without a server: a person's mistakes, and moshi's class by itself."""

import pytest

from launch.serve import is_loopback, main
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
