"""DINOv2, complete: learn image features without labels and put them to work.

The names below are loaded on first use, so that `import unlabeled` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unlabeled import curate as curate
    from unlabeled import evaluate as evaluate
    from unlabeled.dense.reference import segment as segment
    from unlabeled.errors import UserError as UserError
    from unlabeled.features.attention import attention as attention
    from unlabeled.features.embed import embed as embed
    from unlabeled.features.extractor import Extractor as Extractor
    from unlabeled.features.match import match as match
    from unlabeled.features.pca import patch_pca as patch_pca
    from unlabeled.features.similar import similar as similar
    from unlabeled.features.table import FeatureTable as FeatureTable
    from unlabeled.features.table import open_table as open_table
    from unlabeled.finetune.predict import predict as predict
    from unlabeled.finetune.saved import TrainedHead as TrainedHead
    from unlabeled.finetune.saved import load_head as load_head
    from unlabeled.finetune.tune import finetune as finetune
    from unlabeled.pretrain.loop import Run as Run
    from unlabeled.pretrain.loop import distill as distill
    from unlabeled.pretrain.loop import pretrain as pretrain
    from unlabeled.search.index import Index as Index
    from unlabeled.search.index import build_index as build_index
    from unlabeled.search.index import open_index as open_index
    from unlabeled.vit import Tokens as Tokens
    from unlabeled.vit import VisionTransformer as VisionTransformer
    from unlabeled.weights.load import load_model as load_model

__version__ = "0.1.0"

_PLACES = {
    "UserError": "unlabeled.errors",
    "segment": "unlabeled.dense.reference",
    "attention": "unlabeled.features.attention",
    "embed": "unlabeled.features.embed",
    "Extractor": "unlabeled.features.extractor",
    "FeatureTable": "unlabeled.features.table",
    "open_table": "unlabeled.features.table",
    "match": "unlabeled.features.match",
    "patch_pca": "unlabeled.features.pca",
    "similar": "unlabeled.features.similar",
    "predict": "unlabeled.finetune.predict",
    "TrainedHead": "unlabeled.finetune.saved",
    "load_head": "unlabeled.finetune.saved",
    "Index": "unlabeled.search.index",
    "build_index": "unlabeled.search.index",
    "open_index": "unlabeled.search.index",
    "Run": "unlabeled.pretrain.loop",
    "distill": "unlabeled.pretrain.loop",
    "Tokens": "unlabeled.vit",
    "VisionTransformer": "unlabeled.vit",
    "load_model": "unlabeled.weights.load",
}
_PACKAGES = ("curate", "evaluate", "finetune", "pretrain")
__all__ = ["__version__", "curate", "evaluate", "finetune", "pretrain", *_PLACES]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    if name in _PACKAGES:
        return import_module(f"unlabeled.{name}")
    raise AttributeError(f"module 'unlabeled' has no attribute {name!r}")
