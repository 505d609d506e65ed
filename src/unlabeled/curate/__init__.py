"""Curation: from a pile of uncurated images to a pretraining set, with a reason for every decision.

`unlabeled.curate(...)` is the command as a function; the package is callable because it shares its name with that.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from unlabeled.curate.pipeline import curate

        return curate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
