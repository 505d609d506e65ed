"""How good are the features: the papers' protocols, and figures that need no labels.

Each protocol is a function and lies in a module of its name: `unlabeled.evaluate.knn(...)` in evaluate/knn.py.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlabeled.evaluate.result import Result as Result

PROTOCOLS = ("knn", "linear", "logreg", "fewshot", "retrieval", "segmentation", "depth", "health")
_PLACES = {"Result": "unlabeled.evaluate.result"}


class _Package(ModuleType):
    """Importing a module makes it an attribute of its package; a protocol's attribute is its function instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PROTOCOLS and isinstance(value, ModuleType):
            value = getattr(value, name, value)
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in PROTOCOLS:
        return getattr(import_module(f"{__name__}.{name}"), name)
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


sys.modules[__name__].__class__ = _Package
