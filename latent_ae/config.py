"""Frozen typed settings from YAML and key=value words; all errors are reported at once, with the nearest valid key.

This module imports nothing heavy (torch, diffusers, datasets), so that a wrong setting is refused at once.
"""

import difflib
import errno
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from latent_ae.other_names import OTHER_NAMES

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


class UserError(ValueError):
    """A mistake that the user can correct: the command line prints it without a traceback and exits with code 2."""


class ToldElsewhere(UserError):
    """A UserError that the main process prints: this process only exits with code 2."""


class Problem(typing.NamedTuple):
    """One problem of the settings: the key's path, and what is wrong and what to do."""

    key: str
    message: str


S = TypeVar("S", bound="Settings")


class Settings(BaseModel):
    """Base class of all sections: frozen, without unknown keys, infinite numbers, or bools in place of numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `steps: yes` as 1
        annotation = cls.model_fields[str(info.field_name)].annotation
        values = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(item, bool) for item in values) and not _admits(annotation, bool):
            raise ValueError(f"{str(value).lower()} is a yes/no value; something else is expected here")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _no_impossible_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                os.stat(Path(value).expanduser())
            except OSError as error:
                if error.errno == errno.ENAMETOOLONG:
                    raise ValueError(f"is too long for a path or name ({len(value):,} characters)") from None
            except (RuntimeError, ValueError) as error:  # no such user's home; characters that no name holds
                raise ValueError(f"can be no path or name: {error}") from None
        return value

    @classmethod
    def load(cls: type[S], source: str | None = None, *words: str) -> S:
        """Read settings like the command line: `TrainSettings.load("quickstart", "steps=100", "optim.lr=1e-4")`.

        Args:
            source: A YAML file or the name of a recipe; None takes the defaults.
            *words: Changes, each `key=value` or `section.key=value`.

        Raises:
            UserError: With every problem found, one line each.
        """
        return load_settings(cls, source, words)

    @classmethod
    def settle(cls, values: dict[str, Any], given: Sequence[str]) -> None:
        """Remove from a file's values, in place, those that do not go with the keys `given` in words."""

    def problems(self) -> Iterator[Problem]:
        """Yield problems that types cannot express (relations between keys, missing files), also of nested sections."""
        for name in type(self).model_fields:
            section = getattr(self, name)
            if isinstance(section, Settings):
                for problem in section.problems():
                    yield Problem(f"{key_of(type(self), name)}.{problem.key}", problem.message)


def key_of(cls: type[Settings], name: str) -> str:
    """Return a field's key in YAML, which differs from the attribute if pydantic reserves that name (`validate`)."""
    return cls.model_fields[name].alias or name


def names_of(cls: type[Settings]) -> list[str]:
    """Return the names of the fields, those of the class before those of the classes that it extends."""
    bases = [base for base in cls.__mro__ if issubclass(base, Settings)]
    return list(dict.fromkeys(name for base in bases for name in base.__annotations__ if name in cls.model_fields))


def close_word(word: str, words: Sequence[str]) -> str | None:
    """Return the one of `words` that was probably meant, or None."""
    return next(iter(difflib.get_close_matches(word, words, n=1)), None)


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Byte = Annotated[int, Field(ge=0, le=255)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _groups(value: Any) -> Any:
    """Refuse channels that are not in groups once, and not each of them."""
    if isinstance(value, (list, tuple)) and all(isinstance(group, (list, tuple)) for group in value):
        return value
    raise ValueError("is a list of groups, each in brackets of its own, as in [[0,1,2]]")


def _one_or_three(group: tuple[int, ...]) -> tuple[int, ...]:
    if len(group) not in (1, 3):
        raise ValueError(f"{list(group)} is a group of {len(group)}: a network sees one channel or three")
    return group


Bands = Annotated[
    tuple[Annotated[tuple[NonNegative, ...], AfterValidator(_one_or_three)], ...], BeforeValidator(_groups)
]
"""Groups of one or three channels, which networks of gray and RGB images see in turn."""

# Marks of fields: whether a run that is resumed may change them. A mark also holds for the fields of a section.
FIXED = Field(json_schema_extra={"on_resume": "fixed"})
"""May not change: the weights, the order of the samples or the meaning of the metrics would no longer fit."""
FREE = Field(json_schema_extra={"on_resume": "free"})
"""May change, like a field without a mark; for a field in a fixed section."""
SWITCH = Field(json_schema_extra={"on_resume": "switch"})
"""May change its value, but may not be turned on or off: a checkpoint either holds its state or does not, or metrics
before and after would mean different things."""
SILENT = Field(json_schema_extra={"on_resume": "silent"})
"""May change, and the change is not reported."""


def fixed_with(name: str) -> Any:
    """Return the mark of a field that is fixed if the field `name` of its section is on."""
    return Field(json_schema_extra={"on_resume": f"fixed with {name}"})


def resume_marks(cls: type["Settings"], prefix: str = "", above: str = "free") -> dict[str, str]:
    """Return the mark of each setting by its full key.

    Args:
        cls: The class of the settings.
        prefix: What precedes their keys.
        above: The mark of the section that holds them.
    """
    marks: dict[str, str] = {}
    for name, field in cls.model_fields.items():
        key, extra = f"{prefix}{key_of(cls, name)}", field.json_schema_extra
        mark = str(extra["on_resume"]) if isinstance(extra, dict) and "on_resume" in extra else above
        marks[key] = mark
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            marks |= resume_marks(field.annotation, f"{key}.", mark)
    return marks


def looks_like_path(location: str) -> bool:
    """Return True if `location` can only mean a file or folder; `name` and `user/name` may be hub ids.

    `runs/name` is where the recipes write, so it is taken for a folder.
    """
    named = location.startswith(("/", ".", "~", "runs/")) or Path(location).suffix in FILE_SUFFIXES
    return named or location.count("/") > 1


def made_by(location: str) -> str:
    """Return which command makes a folder that is missing, to be added to the message; "" if it is no recipe's."""
    parts = Path(location).parts
    name = parts[1] if len(parts) > 1 and parts[0] == "runs" else ""
    return f"; `latent-ae train {name}` makes it" if name in recipe_names() else ""


MAX_VALUES = 10_000
FILE_SUFFIXES = (".parquet", ".arrow", ".tar", ".yaml", ".yml", ".safetensors", ".ckpt", ".json")


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the package, for `latent-ae train NAME`."""
    return [name for names in recipe_folders().values() for name in names]


def recipe_folders() -> dict[str, dict[str, "Traversable"]]:
    """Return the recipes by folder (small ones first) and by name."""
    folders = [entry for entry in resources.files("latent_ae_configs").iterdir() if entry.is_dir()]
    known = {
        folder.name: {
            entry.name.removesuffix(".yaml"): entry
            for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
            if entry.name.endswith(".yaml")
        }
        for folder in sorted(folders, key=lambda folder: folder.name, reverse=True)
    }
    return {folder: recipes for folder, recipes in known.items() if recipes}


def load_settings(cls: type[S], source: str | None, overrides: Sequence[str] = ()) -> S:
    """Read settings from a YAML file or a recipe, changed by words.

    Args:
        cls: The class of the settings.
        source: A YAML file or the name of a recipe; None takes the defaults.
        overrides: Words, each `key=value` or `section.key=value`; in a list of sections, `phases.2.key=value` or
            `phases.NAME.key=value`. Of words that contradict each other the last one holds.

    Raises:
        UserError: With every problem found, one line each.
    """
    values = _read_yaml(source) if source is not None else {}
    problems = [problem for word in overrides for problem in _apply_override(cls, values, word)]
    cls.settle(values, [word.partition("=")[0] for word in overrides])
    return _checked(cls, values, problems, f" of {source}" if source else "")


def changed_settings(settings: S, changes: Mapping[str, Any]) -> S:
    """Return a copy of `settings` with other values for some keys.

    Raises:
        UserError: With every problem found, one line each.
    """
    return _checked(type(settings), {**settings.model_dump(by_alias=True), **changes}, [], "")


def _checked(cls: type[S], values: dict[str, Any], problems: list[Problem], where: str) -> S:
    settings, invalid = validated(cls, values)
    problems += invalid
    if settings is not None:
        # relations are checked after wrong keys fell back to their defaults, so that one wrong key does not
        # hide another; problems of a wrong key itself are not reported twice
        problems += [problem for problem in settings.problems() if not rests_on(problem, invalid)]
    refuse(problems, where)
    assert settings is not None
    return settings


def rests_on(problem: Problem, invalid: Iterable[Problem]) -> bool:
    """Return whether a relation is about a key with a wrong value: only the default that stands in may break it."""
    keys = {one.key.partition("[")[0] for one in invalid}
    named = {word.rstrip(".") for word in re.findall(r"[\w.]+", problem.message) if "." in word}
    if any(key.endswith(".kind") for key in keys):  # on which nearly all relations rest
        return True
    return problem.key in keys or bool(keys & named)


def refuse(problems: Iterable[Problem], where: str = "") -> None:
    """Raise UserError with all problems, one line each, if there are any; `where` follows "in the settings"."""
    lines = [f"  {problem.key}: {problem.message}" for problem in problems]
    if lines:
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError("\n".join([f"{count} in the settings{where}:", *lines]))


def to_yaml(settings: Settings) -> str:
    """Return all settings as YAML that `load_settings` reads back to an equal object."""
    return yaml.safe_dump(
        settings.model_dump(mode="json", by_alias=True), sort_keys=False, default_flow_style=None, width=100
    )


def _read_yaml(source: str) -> dict[str, Any]:
    path = Path(source).expanduser()
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {source} as UTF-8 text: {error}") from None
    elif source in (recipes := {name: file for names in recipe_folders().values() for name, file in names.items()}):
        text = recipes[source].read_text(encoding="utf-8")
    else:
        close = difflib.get_close_matches(path.stem, recipe_names(), n=1)
        hint = f" Did you mean the recipe {close[0]}?" if close else ""
        raise UserError(f"no such config: {source}.{hint} Give a YAML file or one of: {', '.join(recipe_names())}")
    try:
        values = _parsed(text, _StrictLoader)
    except Exception as error:  # PyYAML raises errors of many kinds, for example for an impossible date
        raise UserError(f"{source} is not valid YAML: {' '.join(str(error).split())[:300]}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{source} must hold `key: value` lines, not a {type(values).__name__}")
    return values


def _parsed(text: str, kind: type[yaml.SafeLoader]) -> Any:
    """Return the one document of a text. Raises yaml.YAMLError, or other errors for values that cannot be built."""
    loader = kind(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None
        # a few lines of nested anchors can stand for billions of values, or never end
        waiting, count = [root], 0
        while waiting:
            node, count = waiting.pop(), count + 1
            if count > MAX_VALUES:
                raise yaml.YAMLError(f"more than {MAX_VALUES:,} values (those of an anchor count wherever it is used)")
            if isinstance(node, yaml.MappingNode):
                waiting += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value
        return loader.construct_document(root)
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice (YAML would silently take the last) and a key that is not text (`on`, `1`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key_node.value!r} is read as {key!r}; put it in quotes", key_node.start_mark
                )
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


def _apply_override(cls: type[Settings], values: dict[str, Any], word: str) -> list[Problem]:
    key, equals, text = word.partition("=")
    if not equals or not key:
        return [Problem(word, "not understood; write key=value, for example optim.lr=1e-4")]
    path = own_key(cls, key).split(".")
    *sections, name = path
    inner: Any = values
    for section in sections:
        if isinstance(inner, list):
            numbers = {str(number): item for number, item in enumerate(inner, 1) if isinstance(item, dict)}
            names = {str(item["name"]): item for item in numbers.values() if "name" in item}
            if section not in numbers | names:
                return [Problem(key, f"there is no {section}, only {', '.join([*numbers, *names]) or 'an empty list'}")]
            inner = (numbers | names)[section]
        else:
            inner = inner.setdefault(section, {})
        if not isinstance(inner, (dict, list)):
            return [Problem(key, f"{section} is not a section")]
    if not isinstance(inner, dict):
        return [Problem(key, f"{sections[-1]} is a list: name one of its sections and a setting in it")]
    try:
        value = _parsed(text, yaml.SafeLoader)
    except Exception:  # PyYAML's reader raises other kinds, too
        value = text
    # names of files and folders stay as they were typed: YAML would read 2024-05-01 as a date, and a # as a comment
    cut = value is None and "#" in text or isinstance(value, str) and value.count("#") < text.count("#")
    kind = _annotation_of(cls, path)
    retyped = not isinstance(value, (str, list, dict, types.NoneType)) and not (
        _admits(kind, type(value)) and str(value).lower() == text.strip().lower()
    )
    inner[name] = text if (cut or retyped) and _is_text(kind) else value
    # sections of a list hold what differs from the settings beside the list; a word that names none holds in all
    for items in values.values():
        for item in items if isinstance(items, list) else ():
            _drop(item, path)
    return []


def own_key(cls: type[Settings], key: str) -> str:
    """Return the key, without training's prefix `data.` if these settings have no such section."""
    name = key.removeprefix("data.")
    if name == key or "data" in cls.model_fields:
        return key
    return f"data_{name}" if f"data_{name}" in cls.model_fields else name


def validated(cls: type[S], values: dict[str, Any]) -> tuple[S | None, list[Problem]]:
    """Check the types of nested values.

    Args:
        cls: The class of the settings.
        values: Values by key; wrong ones are removed from it.

    Returns:
        Settings in which wrong values are replaced by their defaults, or None if that fails, and the problems found.
    """
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        problems = []
        for detail in error.errors():
            place = _place(cls, detail["loc"])
            problems.append(Problem(place.shown, _explain(place, detail)))
            _drop(values, place.setting)
        unique = list({(problem.key, problem.message): problem for problem in problems}.values())
        try:
            return cls.model_validate(values), unique
        except ValidationError:
            return None, unique


class _Place(typing.NamedTuple):
    """Where a wrong value is."""

    setting: list[str]
    """Keys of the setting that is wrong, or that holds the list with the wrong section."""
    shown: str
    """All keys, with the index of a section in a list."""
    owner: type[Settings]
    """The settings, or the class of the sections in a list."""
    path: list[str]
    """Keys in the owner."""


def _place(cls: type[Settings], location: Sequence[int | str]) -> _Place:
    """Return the place of pydantic's location, which also names the members of unions and counts values in lists."""
    place = _Place([], "", cls, [])
    inside: Any = cls
    for part in location:
        if isinstance(part, str) and _is_section(inside):
            path, shown = [*place.path, part], f"{place.shown}.{part}".removeprefix(".")
            place = place._replace(setting=path if place.owner is cls else place.setting, shown=shown, path=path)
            keys = {key_of(inside, name): field.annotation for name, field in inside.model_fields.items()}
            inside = keys.get(part)
        elif isinstance(part, int) and typing.get_origin(inside) is tuple:
            inside = typing.get_args(inside)[0]
            if _is_section(inside):
                place = place._replace(shown=f"{place.shown}[{part}]", owner=inside, path=[])
    return place


def _annotation_of(cls: type[Settings], path: Sequence[str]) -> Any:
    """Return the type of a setting; None if there is no such setting."""
    inside: Any = cls
    for part in path:
        if typing.get_origin(inside) is tuple:  # a list of sections, of a class of their own or like those beside it
            inside = next((one for one in typing.get_args(inside) if _is_section(one)), cls)
            continue
        if not _is_section(inside):
            return None
        inside = {key_of(inside, name): field.annotation for name, field in inside.model_fields.items()}.get(part)
    return inside


def _is_text(annotation: Any) -> bool:
    """Return whether a setting may be any text."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return any(_is_text(inner) for inner in typing.get_args(annotation))
    return annotation is str


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Settings)


def _drop(values: Any, path: list[str]) -> None:
    for section in path[:-1]:
        values = values.get(section) if isinstance(values, dict) else None
    if isinstance(values, dict) and path:
        for key in [key for key in values if str(key) == path[-1]]:
            del values[key]


def _explain(place: _Place, detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        inner, path = detail["input"], list(place.path)
        while isinstance(inner, dict) and len(inner) == 1:  # the innermost key of an unknown section says most
            ((name, inner),) = inner.items()
            path.append(str(name))
        hint = hint_for(place.owner, path)
        return "no such setting" + (f"; {hint}" if hint else "")
    if detail["type"] == "missing":
        return "is missing: give it" if isinstance(detail["loc"][-1], str) else "has too few values"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "tuple_type":
        message = "a list in brackets is expected, as in [a, b]"
    elif detail["type"] in ("dict_type", "model_type"):
        message = "a section of keys and values is expected, as in {key: value}"
    given = detail.get("input")
    shown = "" if isinstance(given, (dict, Settings)) or "yes/no" in message else f" (given: {given!r})"
    return message[:1].lower() + message[1:] + shown


def hint_for(cls: type[Settings], path: list[str]) -> str:
    """Return what to write in place of an unknown key, from other trainers' names or similarity; may be empty."""
    targets, _, remark = OTHER_NAMES.get(path[-1], "").partition(": ")
    known = {key for path_ in all_keys(cls) for key in (path_, path_.split(".")[0])}
    target = next((key for key in targets.split() if key in known), None)
    if target is not None:
        return f"here it is {target}" + (f" ({remark})" if remark else "")
    if remark and not targets:
        return remark
    nearest = nearest_key(cls, path)
    return f"did you mean {nearest}?" if nearest else ""


def nearest_key(cls: type[Settings], path: list[str]) -> str | None:
    """Return the key that was probably meant: similar in the section, of the same name elsewhere, or a similar path."""
    keys, depth = list(all_keys(cls)), len(path)
    siblings = [".".join(parts[:depth]) for key in keys if (parts := key.split("."))[: depth - 1] == path[:-1]]
    alike = difflib.get_close_matches(".".join(path), siblings, n=1, cutoff=0.75)
    same_name = [key for key in keys if key.split(".")[-1] == path[-1]]
    return next(iter(alike or same_name or difflib.get_close_matches(".".join(path), keys, n=1)), None)


def all_keys(cls: type[Settings], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key."""
    for name, field in cls.model_fields.items():
        key = key_of(cls, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from all_keys(field.annotation, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _admits(annotation: Any, kind: type) -> bool:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, tuple, list, Annotated):
        return any(_admits(inner, kind) for inner in typing.get_args(annotation))
    return annotation is kind or annotation is Any
