"""Short runs are short: what takes long in them, and is not what most tests are about, is done for few or left out."""

import html
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import latent_ae_train.finish
from latent_ae.report import charts

_draw = charts._chart


def apply() -> None:
    """From now on a chart is its title, and a few crops and images stand for many.

    Drawing is a third of the time of a short run or evaluation, and networks that have learned nothing are alike on all
    crops.
    """
    charts._chart = _title  # type: ignore[assignment]
    latent_ae_train.finish.STATISTICS_CROPS = 64
    latent_ae_train.finish.CHECK_IMAGES = 2
    latent_ae_train.finish.CPU_SIDE = 128


@contextmanager
def drawn() -> Iterator[None]:
    """Charts are drawn, as users see them."""
    before, charts._chart = charts._chart, _draw
    try:
        yield
    finally:
        charts._chart = before


def _title(_draw: Any, _height: float, title: str, *_: Any, **__: Any) -> str:
    return f'<figure class="chart"><svg>{html.escape(title)}</svg></figure>'
