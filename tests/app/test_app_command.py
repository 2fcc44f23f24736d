"""The command `python -m app`: one sentence for each mistake, and a help that keeps its lines."""

from __future__ import annotations

import socket

import pytest

from app.__main__ import main
from app.options import EXAMPLES, parser
from stepdistill.errors import UserError, cli_errors


def test_a_busy_port_is_one_sentence(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SystemExit) as stopped, cli_errors():
            main(["--port", str(taken.getsockname()[1])])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert said.count("\n") == 1 and "--port" in said and "in use" in said


def test_mistakes_on_the_command_line_are_one_sentence():
    for arguments, word in [
        (["--port", "99999"], "--port"),
        (["--threads", "0"], "--threads"),
        (["--student", "/nowhere"], "--student"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--teacher", ".", "--no-teacher"], "--no-teacher"),
        (["--port", "0", "--attention", "warp"], "attention"),
        (["--port", "0", "--device", "warp"], "device must be"),
        (["--batch", "0"], "--batch"),
        (["--run", "/nowhere"], "--run"),
        (["--results", "/nowhere"], "--results"),
    ]:
        with pytest.raises(UserError, match=word):
            main(arguments)


def test_the_help_keeps_its_lines():
    text = parser().format_help()
    assert EXAMPLES in text
    lines = EXAMPLES.splitlines()
    commands = [line for line in lines if line.startswith("  python -m app") or line.startswith("  curl")]
    # Each example begins a line, and what it does stands below it.
    assert len(commands) == EXAMPLES.count("python -m app") + EXAMPLES.count("curl") >= 6
    assert all(len(line) <= 100 for line in lines)
    parser().parse_args(["--student", "S", "--no-teacher"])
