"""What test_inputs_to_survive.py runs on two processes, OUT and a JSON of {name: words}: each command's exit code and
what it said, of each rank. In `reader` rank 1's reader fails in the second step."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from typing import Any

from accelerate import PartialState

import latent_ae_train.data as data
from latent_ae.__main__ import main
from latent_ae.config import UserError
from latent_ae.data.loader import training_batches


def failing_batches(*arguments: Any, **options: Any) -> Iterator[Any]:
    for number, batch in enumerate(training_batches(*arguments, **options)):
        if number == 1 and options["rank"] == 1:
            raise UserError("data.source: this reader can read no further")
        yield batch


out, commands = sys.argv[1:]
said: dict[str, tuple[int, str]] = {}
for name, words in json.loads(commands).items():
    data.training_batches = failing_batches if name == "reader" else training_batches  # type: ignore[attr-defined]
    with contextlib.redirect_stderr(io.StringIO()) as error, contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    said[name] = (code, error.getvalue())
with open(f"{out}.rank{PartialState().process_index}.json", "w", encoding="utf-8") as stream:
    json.dump(said, stream)
PartialState().destroy_process_group()
