"""The command `unlabeled`: one thin function per command: parse, call one library function, print what it did."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from importlib import import_module
from typing import Any

import typer

from unlabeled.cli.options import app
from unlabeled.errors import UserError
from unlabeled.signals import stop_with_parent

for group in (
    "training",
    "finetune",
    "models",
    "features",
    "search",
    "curate",
    "copies",
    "show",
    "scenes",
    "evaluate",
    "segment",
):  # in the order in which --help lists them
    import_module(f"unlabeled.cli.{group}")


RECIPE_COMMANDS = ("pretrain", "distill")  # take the fields of a pretraining recipe
STOPPED = 130  # exit status after Ctrl-C, as shells have it
ALONE = 10.0  # seconds after which an error is taken to be of one rank alone


def _split(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Recipe fields (--optimizer.lr 1e-3 or --optimizer.lr=1e-3) apart from the rest of a command line.

    They are taken out before the command is parsed: the parser does not know them, and would take their values for
    its own arguments.
    """
    rest: list[str] = []
    fields: dict[str, str] = {}
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, joined, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name or "/" in name:
            rest.append(word)
            continue
        if not joined:
            if not waiting:
                raise UserError(f"--{name} needs a value")
            value = waiting.pop(0)
        fields[name.replace("-", "_")] = value
    return rest, fields


def main() -> None:
    """Run the command; an error of use is one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may have letters that a terminal has not
            stream.reconfigure(errors="backslashreplace")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stop_with_parent()
    try:
        arguments, recipe_fields = _split(sys.argv[1:])
        # Typer turns a KeyboardInterrupt into a code that it returns.
        code = app(arguments, standalone_mode=False, obj=recipe_fields)
        if code == STOPPED:
            raise KeyboardInterrupt
    except UserError as error:
        sys.exit(_said(str(error)))
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        print("unlabeled: stopped", file=sys.stderr)
        sys.exit(STOPPED)
    except UnicodeEncodeError as error:
        sys.exit(_said(f"{error.object!a} is no UTF-8; give it another name."))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        code = _said(f"{error.filename or 'what is printed'} cannot be written: {error.strerror}")
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what standard output still holds would fail once more
        sys.exit(code)
    except Exception as error:
        # typer and click each have their own class for an error of use.
        if hasattr(error, "format_message"):
            sys.exit(_said(_meant(error) or error.format_message()))
        if hasattr(error, "number"):
            if os.environ.get("RANK", "0") == "0":  # of many ranks one says so
                print(error, file=sys.stderr)
            sys.exit(128 + error.number)
        raise


def _meant(error: Any) -> str:
    """What to say of an option that is a recipe's field without its section (--lr), or "" of other errors."""
    command, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    if option is None or command is None or command.info_name not in RECIPE_COMMANDS:
        return ""
    from unlabeled.pretrain.field_names import nearest_field
    from unlabeled.pretrain.recipe import Recipe, field_types

    field = nearest_field(option.removeprefix("--"), field_types(Recipe()))
    return f"No such option: {option}; did you mean --{field}?" if field else ""


def _said(text: str) -> int:
    """Print an error of use, and return the exit status for it.

    What the user gave wrong, all ranks find: rank 0 says it, and when it ends, torchrun ends the others. A rank that
    is still there after a while has an error of its own.
    """
    rank = os.environ.get("RANK", "0")
    if "TORCHELASTIC_RUN_ID" in os.environ and rank != "0":
        time.sleep(ALONE)
        text = f"rank {rank}: {text}"
    print(f"unlabeled: {' '.join(text.split())}", file=sys.stderr)
    return 2
