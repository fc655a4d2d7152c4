"""What whole evaluations need."""

import pytest

from tests.inception import random_inception


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> str:
    return str(random_inception(tmp_path_factory.mktemp("inception") / "random.pth"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Features of originals that no other test has kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
