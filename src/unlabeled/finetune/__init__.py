"""Labelled images put to work: heads on frozen features, low-rank adapters, whole backbones; and what they predict.

`unlabeled.finetune(...)` is the command as a function. The package is callable because it shares its name with
that function, as `unlabeled.pretrain` is.
"""

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from unlabeled.finetune.tune import finetune

        return finetune(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
