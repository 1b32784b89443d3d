"""Which backends a run judges: ``--backend NAME``, or all that run on this machine."""

from __future__ import annotations

import pytest
import torch

from attn_sampler.backends import BACKENDS, REGISTRY, unavailable


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=BACKENDS,
        help="judge this backend only (repeatable); an error where it cannot run. Default: all that can.",
    )


def pytest_configure(config: pytest.Config) -> None:
    for name in config.getoption("--backend") or ():
        if (reason := unavailable(name)) is not None:
            raise pytest.UsageError(f"--backend {name}: {reason}")


def pytest_report_header(config: pytest.Config) -> str:
    return f"attn_sampler backends: {', '.join(_backends(config))}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _backends(metafunc.config))


def pytest_collection_modifyitems(session: pytest.Session, items: list[pytest.Item]) -> None:
    """One visible skip, with its reason, for each backend that cannot be judged here."""
    if session.config.getoption("--backend") or not any("backend" in _fixtures(item) for item in items):
        return
    for name in BACKENDS:
        if (reason := unavailable(name)) is not None:
            reason = f"backend {name} cannot run here: {reason}"
            items.append(_CannotRun.from_parent(session, name=f"backend {name}", reason=reason))


@pytest.fixture
def device(backend: str) -> torch.device:
    """Where the tensors of a test of this backend live."""
    return torch.device(REGISTRY[backend].device or "cpu")


class _CannotRun(pytest.Item):
    def __init__(self, *, reason: str, **arguments: object) -> None:
        super().__init__(**arguments)
        self.reason = reason

    def runtest(self) -> None:
        pytest.skip(self.reason)


def _backends(config: pytest.Config) -> list[str]:
    asked = config.getoption("--backend")
    return [name for name in BACKENDS if (name in asked if asked else unavailable(name) is None)]


def _fixtures(item: pytest.Item) -> list[str]:
    return getattr(item, "fixturenames", [])
