"""What commands with settings have in common: their words, their help, and how a result ends on stdout."""

import argparse
import ast
import functools
import inspect
import json
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from latent_ae.config import Settings, UserError, all_keys, close_word, hint_for, key_of, names_of, own_key

WIDTH = 100


class SettingsParser(argparse.ArgumentParser):
    """The parser of a command whose settings, those of `kind`, are given as key=value; its help lists them."""

    def __init__(self, kind: type[Settings], *, prog: str, description: str, examples: str):
        super().__init__(
            prog=prog, description=description, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.kind, self.examples, self.options = kind, examples, list[str]()

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.options += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **options)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The words; those that change settings are `override`. Prints what --help asks for and exits.

        Raises UserError for a setting that is written like an option.
        """
        words = list(sys.argv[1:] if argv is None else argv)
        self.add_argument("override", nargs="*", default=[], metavar="key=value", help="changes a setting")
        self.add_argument("-h", "--help", nargs="?", metavar="SETTING", help="show this, or one setting or section")
        for position, word in enumerate(words):
            if word in ("-h", "--help"):
                print(self._help_on(next(iter(words[position + 1 :]), "")))
                self.exit()
        self._refuse_settings_as_options(words)
        return self.parse_intermixed_args(words)

    def _help_on(self, topic: str) -> str:
        text = topic_text(self.kind, topic)
        if text is None and topic and "=" not in topic:
            sections = [key_of(self.kind, name) for name in _sections(self.kind)]
            close = close_word(topic, [*sections, *all_keys(self.kind)])
            if close is not None:
                raise UserError(f"--help {topic}: no such setting or section; did you mean {close}?")
        if text is None:
            self.epilog = f"{settings_text(self.kind, self.prog)}\n\n{self.examples}"
            text = self.format_help()
        return text.rstrip("\n")

    def _refuse_settings_as_options(self, words: Sequence[str]) -> None:
        said, meant = list[str](), list[str]()
        for word, following in pairwise([*words, ""]):
            option, equals, value = word.partition("=")
            if not option.startswith("--") or any(known.startswith(option) for known in self.options):
                continue
            key = own_key(self.kind, option.strip("-").replace("-", "_"))
            if key not in all_keys(self.kind):
                close = close_word(option, self.options)
                hint = f"did you mean {close}?" if close else hint_for(self.kind, key.split("."))
                told = f"no such option{'; ' * bool(hint)}{hint}"
                raise UserError(f"{option}: {told} (settings are written key=value; {self.prog} --help lists them)")
            if not equals and following and "=" not in following and not following.startswith("--"):
                word, value = f"{word} {following}", following
            said.append(word)
            meant.append(f"{key}={value or 'true'}")
        if said:
            raise UserError(f"settings are written key=value: give {' '.join(meant)} in place of {' '.join(said)}")


def settings_text(kind: type[Settings], prog: str) -> str:
    """All settings with defaults and meanings; of sections their names and what they are."""
    sections = _sections(kind)
    lines = ["settings, with their defaults:", *_entries(kind)]
    if sections:
        lines += ["", f"sections ({prog} --help SECTION lists the settings of one):"]
        for name, section in sections.items():
            meaning = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
            lines += _wrapped(f"  {key_of(kind, name) + '.*':<15}{meaning}", 17)
    return "\n".join(lines)


def topic_text(kind: type[Settings], topic: str) -> str | None:
    """The settings of a section, or one setting, by its key; None where there is no such key."""
    key = own_key(kind, topic)
    for name, section in _sections(kind).items():
        prefix = key_of(kind, name)
        if key == prefix:
            lines = textwrap.wrap(inspect.cleandoc(section.__doc__ or ""), WIDTH)
            return "\n".join([*lines, "", *_entries(section, f"{prefix}.")])
        if key.startswith(f"{prefix}."):
            found = [other for other in names_of(section) if f"{prefix}.{key_of(section, other)}" == key]
            return "\n".join(_entry(section, found[0], f"{prefix}.")) if found else None
    found = [name for name in names_of(kind) if key_of(kind, name) == key]
    return "\n".join(_entry(kind, found[0])) if found else None


def _sections(kind: type[Settings]) -> dict[str, type[Settings]]:
    annotations = {name: kind.model_fields[name].annotation for name in names_of(kind)}
    return {
        name: annotation
        for name, annotation in annotations.items()
        if isinstance(annotation, type) and issubclass(annotation, Settings)
    }


def _entries(kind: type[Settings], prefix: str = "") -> Iterator[str]:
    for name in names_of(kind):
        if name not in _sections(kind):
            yield from _entry(kind, name, prefix)


def _entry(kind: type[Settings], name: str, prefix: str = "") -> Iterator[str]:
    field = kind.model_fields[name]
    word = f"  {prefix}{key_of(kind, name)}={written(field.get_default(call_default_factory=True))}"
    yield from _wrapped(f"{word:<38}  {_values_of(field.annotation)}", 40)
    if meaning := meanings(kind).get(name):
        yield from _wrapped(f"      {meaning}", 6)


def _wrapped(text: str, indent: int) -> list[str]:
    head = len(text) - len(text.lstrip())
    # words of keys and choices stay whole
    return textwrap.wrap(
        text[head:],
        WIDTH,
        initial_indent=head * " ",
        subsequent_indent=indent * " ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=True,
    )


@functools.cache
def meanings(kind: type[Settings]) -> dict[str, str]:
    """What stands under each field in the source of `kind`, or else of a class that it extends."""
    found: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if issubclass(base, Settings)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def written(value: Any) -> str:
    """A value as it is typed after `key=`."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(written(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def _values_of(annotation: Any) -> str:
    """The values that a type admits, in words."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return " | ".join(written(value) for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_values_of(part) for part in inner)
    if origin is typing.Annotated:
        return _values_of(inner[0])
    if origin is tuple:
        return f"[{', '.join('...' if part is Ellipsis else _values_of(part) for part in inner)}]"
    names = {bool: "true | false", int: "integer", float: "number", str: "text", type(None): "null"}
    return names.get(annotation, "{key: value, ...}")


def as_json(result: dict[str, Any]) -> str:
    return json.dumps(result, indent=2)


def print_result(
    compute: Callable[[], dict[str, Any]], batch_size: int, as_text: Callable[[dict[str, Any]], str] = as_json
) -> int:
    """Prints the result of `compute`, as the text that `as_text` makes of it, from the main process.

    Returns the exit code. Raises UserError when the device's memory is too small for `batch_size`.
    """
    import torch
    from accelerate import PartialState

    try:
        result = compute()
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"out of memory with batch_size {batch_size}: lower batch_size or the images' size ({first_line})"
        ) from error
    if PartialState().is_main_process:
        print(as_text(result))
    PartialState().destroy_process_group()
    return 0
