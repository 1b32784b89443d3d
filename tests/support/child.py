"""A pytest in a process of its own that runs the tests that it is asked for: both ends of the pipe to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

#: Seconds for a test, and for the start: minutes more than any takes on a busy machine.
LIMIT = 600


class StoppedError(Exception):
    """The process ended, or had to be ended, when it should not; the text says how, with what it printed."""


class Child:
    """The process, as its starter sees it.

    Parameters
    ----------
    arguments
        Of pytest.
    environment
        Added to this process's own.
    stand_in
        What takes the place of the extension: a class in ``stand_ins`` and its arguments.
    folder
        Where it runs.
    """

    def __init__(
        self, arguments: list[str], environment: Mapping[str, str], stand_in: tuple | None, folder: Path
    ) -> None:
        # What the environment tells this pytest (options, its place among several) is not for another.
        own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        self._connection, theirs = Pipe()
        self._outputs = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115  (they stay open)
        self._seen = [0, 0]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=folder,
                env={**own, **environment},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._outputs[0],
                stderr=self._outputs[1],
            )
        self._ask((stand_in, arguments))

    def run(self, name: str, following: str | None) -> list[dict[str, Any]]:
        """The reports of a test, serialized. What it shares with the following one stays set up."""
        self._seen = [os.fstat(output.fileno()).st_size for output in self._outputs]
        reports = self._ask((name, following))
        failed = [report for report in reports if report["outcome"] == "failed"]
        if failed and (printed := self._printed(1)):
            failed[0]["sections"].append(("Captured stderr of the process", printed))
        return reports

    def close(self) -> None:
        """Let it end, and see that it ends well."""
        self._connection.close()
        status = self._wait()
        if status != 0:
            raise self._stopped("did not end well", status)

    def _ask(self, question: object) -> Any:
        try:
            self._connection.send(question)
            if self._connection.poll(LIMIT):
                return self._connection.recv()
        except (EOFError, OSError):
            raise self._stopped("ended before it answered", self._wait()) from None
        self._process.send_signal(signal.SIGABRT)  # faulthandler shows where it is
        raise self._stopped(f"did not answer within {LIMIT} s", self._wait())

    def _wait(self) -> int:
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _stopped(self, how: str, status: int) -> StoppedError:
        end = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        printed = [text for index in (0, 1) if (text := self._printed(index))]
        return StoppedError("\n".join((f"The process of this test {how}: {end}.", *printed)))

    def _printed(self, index: int) -> str:
        """The end of what it has printed to stdout (0) or stderr (1) since it was asked."""
        output = self._outputs[index].fileno()  # its position is the process's
        size = os.fstat(output).st_size
        start = max(self._seen[index], size - 8000)
        return os.pread(output, size - start, start).decode(errors="replace").strip()


class Server:
    """A plugin of the pytest in the process: instead of all tests it runs those that it is asked for."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._reports: list[dict[str, Any]] = []
        self.done = False

    def pytest_configure(self, config: pytest.Config) -> None:
        self._config = config

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # to collect: pytest says so
        items = {item.nodeid: item for item in session.items}
        self._connection.send(None)
        while not self.done:
            try:
                name, following = self._connection.recv()
            except EOFError:
                self.done = True
                continue
            self._reports = []
            item, next_item = items[name], items.get(following)
            self._config.hook.pytest_runtest_protocol(item=item, nextitem=next_item)
            self._connection.send(self._reports)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        self._reports.append(hook.pytest_report_to_serializable(config=self._config, report=report))


def main(descriptor: int) -> int:
    os.set_inheritable(descriptor, False)
    connection = Connection(descriptor)
    stand_in, arguments = connection.recv()
    server = Server(connection)
    plugins: list[object] = [server]
    if stand_in is not None:
        import stand_ins

        kind, *rest = stand_in
        plugins.append(getattr(stand_ins, kind)(*rest))
    status = pytest.main(arguments, plugins=plugins)
    return 0 if server.done else int(status) or 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
