"""What all Python tests share: where the optional test material lies, and how left-out cases are counted."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest
from hypothesis import settings

from rustune import notices

ROOT = Path(__file__).resolve().parents[2]
_LEFT_OUT = pytest.StashKey[int]()
_WITHOUT_PEERS = pytest.StashKey[int]()
PEERS = ("torch", "transformers", "peft", "trl")

# The same examples on every machine, and no limit that a busy one could miss.
settings.register_profile("rustune", derandomize=True, deadline=None, database=None)
settings.load_profile("rustune")


def pytest_configure(config: pytest.Config) -> None:
    # A shell starts background jobs deaf to Ctrl-C; the tests that press it need Python's own handler.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_LEFT_OUT] = config.stash[_WITHOUT_PEERS] = 0


@pytest.fixture
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of real checkpoints and vectors beside the repository; a test that asks for it is left out without."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        request.config.stash[_LEFT_OUT] += 1
        pytest.skip("shared data not found")
    return folder


@pytest.fixture
def peers(request: pytest.FixtureRequest) -> None:
    """Leaves a test out where the libraries it compares with are not installed: CI has none of them."""
    if missing := [name for name in PEERS if importlib.util.find_spec(name) is None]:
        request.config.stash[_WITHOUT_PEERS] += 1
        pytest.skip(f"{', '.join(missing)} not installed")


@pytest.fixture(autouse=True)
def _nothing_told_yet() -> None:
    """Lines that are told once in a process are told once in a test."""
    notices.forget()


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden files made by tests/golden/make_golden.py."""
    return ROOT / "tests" / "golden"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash[_LEFT_OUT]:
        terminalreporter.write_line(f"left out {left_out} cases: shared data not found")
    if left_out := config.stash[_WITHOUT_PEERS]:
        terminalreporter.write_line(f"left out {left_out} cases: {', '.join(PEERS)} not all installed")
