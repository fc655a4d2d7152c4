"""The setting `phases`: what differs from the other settings in each of several phases that run one after another."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from latent_ae.config import Problem, UserError, rests_on, validated
from latent_ae.objectives.gan import shape_of

if TYPE_CHECKING:
    from .settings import TrainSettings

NAME = re.compile(r"[A-Za-z][\w-]{0,59}", re.ASCII)
"""Names begin with a letter, so that a word's `phases.2` can only be a number; they are part of a folder's name."""
OF_THE_WHOLE = ("output_dir", "push_to_hub", "init_from", "phases")
"""Settings that a phase cannot have of its own; init_from is that of the first phase."""


class Phase(NamedTuple):
    """One phase of a run. A run without the setting `phases` has one phase, which is the run itself."""

    recipe: "TrainSettings"
    """The settings of the whole run."""
    number: int
    """Its place among the phases, from 1."""
    name: str | None
    settings: "TrainSettings"
    """Its own settings: its folder is their output_dir, and a later phase's init_from is the folder before it."""
    first_start: "TrainSettings"
    """The same with the init_from of the first phase, for checks that come before any phase has trained."""
    implied: dict[str, Any]
    """Settings that follow from the phase before."""

    @property
    def alone(self) -> bool:
        """Whether the run has no list of phases."""
        return not self.recipe.phases

    @property
    def last(self) -> bool:
        """Whether no phase follows."""
        return self.alone or self.number == len(self.recipe.phases)

    @property
    def folder(self) -> Path:
        """The folder in which it runs."""
        return Path(self.settings.output_dir).expanduser()

    @property
    def whole(self) -> Path:
        """The folder of the whole run."""
        return Path(self.recipe.output_dir).expanduser()

    @property
    def title(self) -> str:
        """Its place and name in words."""
        return f"phase {self.number} of {len(self.recipe.phases)}" + (f" ({self.name})" if self.name else "")

    @contextmanager
    def named_in_errors(self) -> Iterator[None]:
        """Put the phase in front of the message of a UserError in a `with` block."""
        try:
            yield
        except UserError as error:
            if self.alone:
                raise
            raise type(error)(f"{self.title}: {error}") from error


def phases_of(settings: "TrainSettings") -> list[Phase]:
    """Return the phases of a run, the first one first.

    The settings of a phase are those of the whole, and over them those in its entry of `phases`. A later phase starts
    from the one before: from its averaged weights, and from its discriminator if that has trained, has the same shape
    and the entry does not name another one. It keeps the steps by layer that a linear start has.

    Args:
        settings: Settings that passed their checks.
    """
    if not settings.phases:
        return [Phase(settings, 1, None, settings, settings, {})]
    phases: list[Phase] = []
    replaced = False
    for number, entry in enumerate(settings.phases, 1):
        own = type(settings).model_validate(_values_of(settings, entry, number))
        name = entry.get("name")
        folder = os.path.join(settings.output_dir, "phases", f"{number}-{name}" if name else str(number))
        implied: dict[str, Any] = {}
        if phases:
            before = phases[-1].settings
            implied["init_from"] = before.output_dir
            if _hands_over(before, own) and "init_from" not in (entry.get("gan") or {}):
                implied["gan"] = {"init_from": before.output_dir}
        own = own.model_copy(update={"output_dir": folder, "push_to_hub": None})
        gan = own.gan.model_copy(update=implied.get("gan", {}))
        # after a new decoder, the shape is no more that of the section model
        replaced = replaced or bool(phases and own.decoder.wanted)
        model = {"model": type(own.model)()} if replaced else {}
        if phases and phases[0].settings.layerwise and own.optim.layerwise is None and own.optim.kind == "adamw":
            # they look at what the encoder makes of images, and are for the class of the first phase
            implied["optim"] = {"layerwise": not replaced and own.decoder.latents is None}
        optim = own.optim.model_copy(update=implied.get("optim", {}))
        start = {"gan": gan, "optim": optim, "init_from": implied.get("init_from", own.init_from), **model}
        started = own.model_copy(update=start)
        decoder = own.decoder
        if not decoder.wanted:
            decoder = settings.decoder.model_copy(update={"latents": decoder.latents})
        first_start = own.model_copy(update={"decoder": decoder})
        phases.append(Phase(settings, number, name, started, first_start, implied))
    return phases


def _hands_over(before: "TrainSettings", after: "TrainSettings") -> bool:
    """Return whether a phase begins with the discriminator of the phase before."""
    trained = before.gan.weight and before.steps > before.gan.start
    return bool(trained and after.gan.weight and shape_of(before) == shape_of(after))


def phase_problems(settings: "TrainSettings") -> Iterator[Problem]:
    """Yield what is wrong with the phases; a problem that all of them share, and none has of its own, is told once."""
    names: set[str] = set()
    first: TrainSettings | None = None
    found: list[tuple[str, list[Problem]]] = []
    for number, entry in enumerate(settings.phases, 1):
        name = entry.get("name")
        named = isinstance(name, str) and NAME.fullmatch(name) is not None
        prefix = f"phases.{name if named else number}"
        if name is not None and not named:
            yield Problem(f"{prefix}.name", f"{name!r}: give a letter, then letters, digits, _ or -, 60 at most")
        elif named and name in names:
            yield Problem(f"{prefix}.name", "is given twice: give each phase a name of its own")
        names.add(str(name))
        for key in entry.keys() & set(OF_THE_WHOLE):
            yield Problem(f"{prefix}.{key}", "belongs to the run as a whole: set it outside of phases")
        own, invalid = validated(type(settings), _values_of(settings, entry, number))
        problems = list(invalid)
        if own is not None:
            # a later phase has an init_from, and its shape is that of the phase before
            settled = {"decoder", "model"} if number > 1 else set()
            problems += [
                problem for problem in own.problems() if problem.key not in settled and not rests_on(problem, invalid)
            ]
            if first is not None and own.model != first.model:
                yield Problem(f"{prefix}.model", "the shape stays that of the first phase: leave it out")
            first = first or own
        found.append((prefix, problems))
    everywhere = set.intersection(*({*problems} for _, problems in found))
    everywhere = {one for one in everywhere if not any(_gives(entry, one.key) for entry in settings.phases)}
    yield from (problem for problem in found[0][1] if problem in everywhere)
    for prefix, problems in found:
        yield from (Problem(f"{prefix}.{one.key}", one.message) for one in problems if one not in everywhere)


def _values_of(settings: "TrainSettings", entry: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return the values of a phase: those of the whole, with those of its entry over them.

    A new decoder of the whole is that of the first phase, which the later ones go on to train, on the same latents.
    """
    values = settings.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"phases"})
    if number > 1 and "decoder" in values:
        values["decoder"] = {"latents": settings.decoder.latents}
    return merged(values, {key: value for key, value in entry.items() if key not in ("name", *OF_THE_WHOLE)})


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values with others over them."""
    both = dict(values)
    for key, change in changes.items():
        inner = both.get(key)
        both[key] = merged(inner, change) if isinstance(inner, dict) and isinstance(change, dict) else change
    return both


def _gives(entry: Mapping[str, Any], key: str) -> bool:
    """Return whether an entry has a setting, or a section that holds it."""
    value: Any = entry
    for part in key.split("."):
        if not isinstance(value, dict):
            return True
        if part not in value:
            return False
        value = value[part]
    return True
