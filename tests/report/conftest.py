"""Pages as users see them."""

from collections.abc import Iterator

import pytest

from tests.economy import drawn


@pytest.fixture(autouse=True, scope="module")
def charts_are_drawn() -> Iterator[None]:
    with drawn():
        yield
