"""Scripts that processes import which they have started."""

from __future__ import annotations

from multiprocessing import current_process

from unlabeled.errors import UserError


def refuse_imported_script() -> None:
    """Refuse to start processes from a script that such a process is just importing.

    A process that begins with an empty memory (on macOS, and from Python 3.14 on everywhere) imports the script that
    started it, and would make the same call again.

    Raises:
        UserError: it is so.
    """
    if getattr(current_process(), "_inheriting", False):  # as multiprocessing itself asks
        raise UserError(
            "The processes that this call starts import your script, and come to this call again: put it under "
            '`if __name__ == "__main__":`'
        )
