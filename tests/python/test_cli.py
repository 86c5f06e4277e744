"""The command line: help at once, mistakes named, and `info` tells of this machine."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rustune import cli


@pytest.mark.parametrize("arguments", [["--help"], ["quickstart", "--help"], ["info", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    assert "rustune" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["quickstart", "--seed", "many"]])
def test_a_mistake_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: rustune" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert "version" in capsys.readouterr().out


def test_the_module_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "rustune.cli", "info"], capture_output=True, text=True, check=True)
    assert "version" in done.stdout
