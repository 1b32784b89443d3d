"""Where the tests of the backends run: in all places that this machine has, or in that of ``--backend NAME``.

In a place with a process of its own (support/places.py) a pytest (support/child.py) runs each test when its
turn comes. Its reports are logged as if the test had run here.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from _pytest.runner import runtestprotocol
from child import Child, StoppedError
from places import NOT_IMPORTABLE, PLACES, TESTS, cpu_isa, device_of, takes
from table import Table

collect_ignore = NOT_IMPORTABLE
_CHOSEN = pytest.StashKey[list[str]]()
_CHILDREN = pytest.StashKey["Children"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=tuple(PLACES),
        help="judge this backend, in this place, only (repeatable); an error where it cannot run. "
        "Default: all that can.",
    )
    parser.addoption("--served", action="store_true", help="this process is the place that --backend names")


def pytest_configure(config: pytest.Config) -> None:
    if (worker := getattr(config, "workerinput", None)) is not None:
        # Threads of processes that share the cores would wait for one another, spinning.
        share = max(1, (os.cpu_count() or 1) // worker["workercount"])
        torch.set_num_threads(share)
        os.environ["OMP_NUM_THREADS"] = str(share)  # of the processes that tests start
    asked = config.getoption("--backend")
    if not config.getoption("--served"):
        for name in asked or ():
            if (reason := PLACES[name].unavailable()) is not None:
                raise pytest.UsageError(f"--backend {name}: {reason}")
        isa = {"cpu": f"cpu@{cpu_isa()}"} if PLACES["cpu"].unavailable() is None else {}
        config.pluginmanager.register(Table(list(PLACES), isa))
    config.stash[_CHOSEN] = [n for n in PLACES if (n in asked if asked else _left_out(n) is None)]
    config.stash[_CHILDREN] = Children(config)


def pytest_report_header(config: pytest.Config) -> str:
    return f"attn_sampler backends: {', '.join(config.stash[_CHOSEN])}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = [n for n in metafunc.config.stash[_CHOSEN] if takes(n, metafunc.definition)]
        metafunc.parametrize("backend", names or [None], indirect=True)


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """The tests of one place together, those of this process first; and one visible skip, with its reason,
    for each place that is left out."""
    elsewhere = [name for name in session.config.stash[_CHOSEN] if PLACES[name].tests is not None]
    order = {name: index for index, name in enumerate(elsewhere, start=1)}
    items[:] = [item for item in items if _has_a_place(item)]
    items.sort(key=lambda item: order.get(_place(item), 0))
    for item in items:
        if (name := _place(item)) is not None:
            item.user_properties.append(("place", name))
    if session.config.getoption("--backend") or not any(map(_place, items)):
        return
    for name in PLACES:
        if (reason := _left_out(name)) is not None:
            items.append(_CannotRun.from_parent(session, name=f"backend {name}", place=name, reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if _runs_here(item):
        if nextitem is None or _runs_here(nextitem):
            return None
        reports = runtestprotocol(item, log=False, nextitem=None)  # nothing stays set up during the others
    else:
        reports = item.config.stash[_CHILDREN].run(item, nextitem)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_CHILDREN].close()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> str:
    return PLACES[request.param].backend


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of a test of this backend live."""
    return device_of(backend)


class Children:
    """The process of the place whose turn it is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._child: Child | None = None
        self._place: str | None = None
        self._broken: set[str] = set()

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> list[pytest.TestReport]:
        """The reports of a test that runs elsewhere."""
        name = _place(item)
        assert name is not None
        following = nextitem.nodeid if nextitem is not None and _place(nextitem) == name else None
        reports: list[pytest.TestReport] = []
        try:
            if self._child is None or self._place != name:
                self.close()
                self._child, self._place = self._start(name), name
            reports += map(self._report, self._child.run(item.nodeid, following))
            if following is None:
                self.close()
        except StoppedError as error:
            self._child = None
            phase = "teardown" if reports else "call"
            reports.append(_failure(item, phase, f"{name}: {error}"))
        return reports

    def close(self) -> None:
        if (child := self._child) is not None:
            self._child = None
            child.close()

    def _start(self, name: str) -> Child:
        if name in self._broken:
            raise StoppedError("did not start, as the first of its tests tells")
        config, place = self._config, PLACES[name]
        assert place.tests is not None
        factory = config._tmp_path_factory  # type: ignore[attr-defined]
        arguments = [
            *("--served", f"--backend={name}", *place.options, "-c", str(config.inipath)),
            *("-o", "addopts=--strict-markers", "-p", "no:cacheprovider", f"--tb={config.option.tbstyle}"),
            # What the kernels print is heard even when they end the process.
            *("--capture=sys", f"--basetemp={factory.mktemp('place')}"),
            *(["-v"] * config.option.verbose),
            *(["--showlocals"] if config.option.showlocals else []),
            *(str(TESTS / file) for file in place.tests),
        ]
        try:
            return Child(arguments, place.environment, place.stand_in(factory), config.rootpath)
        except Exception as error:
            self._broken.add(name)
            raise StoppedError(f"did not start. {error}") from error

    def _report(self, data: dict[str, Any]) -> pytest.TestReport:
        return self._config.hook.pytest_report_from_serializable(config=self._config, data=data)


class _CannotRun(pytest.Item):
    def __init__(self, *, place: str, reason: str, **arguments: object) -> None:
        super().__init__(**arguments)
        self.reason = f"{place} is left out: {reason}"
        self.user_properties.append(("absent", f"{place}: {reason}"))

    def runtest(self) -> None:
        pytest.skip(self.reason)


def _left_out(name: str) -> str | None:
    """Why the tests do not run in this place unless it is asked for."""
    return PLACES[name].unavailable() or PLACES[name].left_out()


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _place(item: pytest.Item) -> str | None:
    return _parameters(item).get("backend")


def _has_a_place(item: pytest.Item) -> bool:
    """False of a test of a backend that none of the chosen places takes, or takes without this parameter."""
    name = _place(item)
    if name is None:
        return "backend" not in _parameters(item)
    return PLACES[name].tests is None or takes(name, item)


def _runs_here(item: pytest.Item) -> bool:
    name = _place(item)
    return name is None or PLACES[name].tests is None or item.config.getoption("--served")


def _failure(item: pytest.Item, phase: str, text: str) -> pytest.TestReport:
    return pytest.TestReport(
        item.nodeid, item.location, {}, "failed", text, phase, user_properties=item.user_properties
    )
