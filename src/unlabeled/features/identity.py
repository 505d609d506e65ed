"""What features must share to be comparable: their model, kind and preprocessing."""

from __future__ import annotations

from typing import Any

from unlabeled.errors import UserError


def check_same(wanted: dict[str, Any], given: dict[str, Any], of_wanted: str, of_given: str) -> None:
    """Raise UserError, naming what differs, unless features of two identities are comparable."""
    for name, value in wanted.items():
        other: Any = given.get(name)
        if name == "model":
            if value["weights"] != other["weights"]:
                raise UserError(
                    f"{of_wanted} are of other weights than {of_given}: {value['name'] or 'a model'} "
                    f"({value['weights'][:12]}) and {other['name'] or 'a model'} ({other['weights'][:12]}); "
                    "only features of one model can be compared."
                )
        elif value != other:
            raise UserError(f"{of_wanted} have {name} {_said(value)}, {of_given} {_said(other)}.")


def _said(value: Any) -> str:
    return " ".join(f"{name} {one}" for name, one in value.items()) if isinstance(value, dict) else str(value)
