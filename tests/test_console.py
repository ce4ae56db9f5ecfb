"""Messages of the package: of the command line on standard error, of the library through logging alone."""

from __future__ import annotations

import logging

import pytest

from matex_pl.cli import main
from matex_pl.console import progress


@pytest.fixture
def package_logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger as it is in a program that has not used the command line."""
    logger = logging.getLogger("matex_pl")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    level = logger.level
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.setLevel(level)


def test_a_library_is_silent_until_it_is_asked(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    part = logging.getLogger("matex_pl.roar.run")
    part.info("unseen")
    assert not caplog.records
    with caplog.at_level(logging.INFO, "matex_pl"):
        part.info("seen")
    assert [record.message for record in caplog.records] == ["seen"]
    assert capsys.readouterr() == ("", "")


def test_the_command_line_shows_messages_once(
    package_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["--version"])
    capsys.readouterr()
    logging.getLogger("matex_pl.roar.run").info("%d of %d runs to do", 2, 3)
    assert capsys.readouterr() == ("", "2 of 3 runs to do\n")


def test_progress_passes_the_items_on() -> None:
    assert list(progress(iter(range(3)), "items", 3)) == [0, 1, 2]


def test_long_work_writes_a_line_a_minute_where_there_is_no_terminal(
    package_logger: logging.Logger, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each of the items takes ten seconds.
    times = iter(range(0, 10_000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    with caplog.at_level(logging.INFO, "matex_pl"):
        assert list(progress(range(20), "maps")) == list(range(20))
    assert [record.message for record in caplog.records] == [
        "maps: 1 of 20, about 3 min left",
        "maps: 8 of 20, about 2 min left",
        "maps: 15 of 20, about 50 s left",
    ]
