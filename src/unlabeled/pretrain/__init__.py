"""Pretraining by self-distillation: DINO, iBOT, KoLeo, an EMA teacher, multi-crop.

`unlabeled.pretrain(...)` is the command as a function. The package is callable because it shares its name with
that function: importing any of its modules would otherwise hide the function behind the package.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from unlabeled.pretrain.loop import pretrain

        return pretrain(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
