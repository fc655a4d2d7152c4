"""The common part of commands with settings: parsing of their words, their help, and printing of a result."""

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


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps texts and the lines of an argument's help as they are, and breaks no name at its hyphens."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        lines = text.split("\n")
        indent = "  " if len(lines) > 1 else ""
        wrapped = [textwrap.wrap(line, width, break_on_hyphens=False, subsequent_indent=indent) for line in lines]
        return [part for parts in wrapped for part in parts]


class SettingsParser(argparse.ArgumentParser):
    """The parser of a command whose settings are written key=value; its help lists them.

    Args:
        kind: The class of the settings.
        prog: The command as it is typed.
        description: Text above the arguments in the help.
        examples: Text below the settings in the help.
    """

    def __init__(self, kind: type[Settings], *, prog: str, description: str, examples: str):
        super().__init__(prog=prog, description=description, add_help=False, formatter_class=Formatter)
        self.kind, self.examples, self.options = kind, examples, list[str]()

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        self.options += [name for name in names if name.startswith("-")]
        return super().add_argument(*names, **options)

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse the words of a command. For --help, print the help and exit.

        Args:
            argv: The words; None takes those of this process.

        Returns:
            The arguments; `override` holds the words that change settings.

        Raises:
            UserError: If a setting is written like an option, or --help names an unknown setting.
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
        written_as, meant = list[str](), list[str]()
        for word, following in pairwise([*words, ""]):
            option, equals, value = word.partition("=")
            if not option.startswith("--") or any(known.startswith(option) for known in self.options):
                continue
            key = own_key(self.kind, option.strip("-").replace("-", "_"))
            if key not in all_keys(self.kind):
                close = close_word(option, self.options)
                hint = f"did you mean {close}?" if close else hint_for(self.kind, key.split("."))
                problem = f"no such option{'; ' * bool(hint)}{hint}"
                raise UserError(f"{option}: {problem} (settings are written key=value; {self.prog} --help lists them)")
            if not equals and following and "=" not in following and not following.startswith("--"):
                word, value = f"{word} {following}", following
            written_as.append(word)
            meant.append(f"{key}={value or 'true'}")
        if written_as:
            wrong = " ".join(written_as)
            raise UserError(f"settings are written key=value: give {' '.join(meant)} in place of {wrong}")


def settings_text(kind: type[Settings], prog: str) -> str:
    """Return help on all settings with their defaults and meanings; sections are listed by name and first paragraph."""
    sections = _sections(kind)
    lines = ["settings, with their defaults:", *_entries(kind)]
    if sections:
        lines += ["", f"sections ({prog} --help SECTION lists the settings of one):"]
        for name, section in sections.items():
            meaning = inspect.cleandoc(section.__doc__ or "").split("\n\n")[0]
            lines += _wrapped(f"  {key_of(kind, name) + '.*':<18}{meaning}", 20)
    return "\n".join(lines)


def topic_text(kind: type[Settings], topic: str) -> str | None:
    """Return help on a section or on one setting by its key; None if there is no such key."""
    key = own_key(kind, topic)
    for name, section in _sections(kind).items():
        prefix = key_of(kind, name)
        if key == prefix:
            lines = textwrap.wrap(inspect.cleandoc(section.__doc__ or ""), WIDTH)
            return "\n".join([*lines, "", *_entries(section, f"{prefix}.")])
        if key.startswith(f"{prefix}."):
            names = [other for other in names_of(section) if f"{prefix}.{key_of(section, other)}" == key]
            return "\n".join(_entry(section, names[0], f"{prefix}.")) if names else None
    names = [name for name in names_of(kind) if key_of(kind, name) == key]
    return "\n".join(_entry(kind, names[0])) if names else None


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
    # keys and choices are not broken
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
    """Return the docstring below each field in the source of `kind` or of a class that it extends."""
    texts: dict[str, str] = {}
    for base in reversed([base for base in kind.__mro__ if issubclass(base, Settings)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in pairwise(definition.body):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def written(value: Any) -> str:
    """Return a value as it is typed after `key=`."""
    if isinstance(value, (tuple, list)):
        return f"[{','.join(written(item) for item in value)}]"
    return value if isinstance(value, str) else json.dumps(value)


def _values_of(annotation: Any) -> str:
    """Return in words which values a type admits."""
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
    """Return a result as indented JSON."""
    return json.dumps(result, indent=2)


def print_result(
    compute: Callable[[], dict[str, Any]], batch_size: int, as_text: Callable[[dict[str, Any]], str] = as_json
) -> int:
    """Compute a result and print it from the main process.

    Args:
        compute: Returns the result.
        batch_size: Named in the message if memory is too small.
        as_text: Turns the result into the text that is printed.

    Returns:
        The exit code, 0.

    Raises:
        UserError: If the device has too little memory.
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
