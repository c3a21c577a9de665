"""`make` with a stand-in for Python, which notes what it is asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import REPO

# `python -m venv FOLDER` puts itself there.
PYTHON = """#!/bin/sh
echo "$@" >> asked.txt
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
"""
CHOSEN = "torch==2.11.0 --index-url https://example.org/cu130"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(REPO / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def installed_torch(checkout: Path, *arguments: str) -> list[str]:
    """What torch `make` installs."""
    asked = checkout / "asked.txt"
    asked.unlink(missing_ok=True)
    settings = {name: value for name, value in os.environ.items() if name not in ("TORCH", "VENV")}
    command = ["make", f"PYTHON={checkout / 'python'}", *arguments]
    subprocess.run(command, cwd=checkout, env=settings, check=True, capture_output=True)
    installs = [line for line in asked.read_text().splitlines() if "install" in line]
    return [line.partition("--quiet ")[2] for line in installs if "torch==" in line]


def test_a_chosen_torch_stays_until_another_is_chosen(checkout):
    default = installed_torch(checkout, "test-fast")
    assert len(default) == 1
    assert installed_torch(checkout, "test-fast") == []
    assert installed_torch(checkout, "setup", f"TORCH={CHOSEN}") == [CHOSEN]
    assert installed_torch(checkout, "test-fast") == []
    assert installed_torch(checkout, "setup", "test-fast") == []
    with (checkout / "requirements.txt").open("a") as file:
        file.write("# another pin\n")
    assert installed_torch(checkout, "test-fast") == [CHOSEN]
    assert installed_torch(checkout, "setup", f"TORCH={default[0]}") == default
    assert installed_torch(checkout, "test-fast") == []


def test_a_new_pin_takes_the_place_of_the_old(checkout):
    default = installed_torch(checkout, "test-fast")
    makefile = checkout / "Makefile"
    makefile.write_text(makefile.read_text().replace(default[0], "torch==9.9.9"))
    assert installed_torch(checkout, "test-fast") == ["torch==9.9.9"]
