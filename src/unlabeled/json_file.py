"""JSON files that a user may have damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unlabeled.errors import UserError, reading


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; raises UserError where it is none."""
    try:
        with reading(path):
            held = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is no valid JSON; fetch or export the model anew.") from error
    if not isinstance(held, dict):
        raise UserError(f"{path} is no JSON object; fetch or export the model anew.")
    return held
