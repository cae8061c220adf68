"""Before any test imports torch."""

import os

import pytest

# Runs in this process and in others are compared bit for bit, so all of them compute with as many threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import asrkit  # noqa: F401  it may set what torch reads once
from helpers.hangs import pytest_runtest_protocol  # noqa: F401  a hook


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is remembered of manifests lies beside the tests' files."""
    os.environ["ASRKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
