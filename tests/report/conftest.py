"""Pages as users see them."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def charts_are_drawn() -> Iterator[None]:
    from tests.economy import drawn

    with drawn():
        yield
