"""SuperGlobal (ICCV 2023) image retrieval: descriptors, search, reranking and scores in a few lines.

model = superglobal.load_model("CVPR2022_CVNet_R50.pyth")
data = superglobal.revisited_set("data", "roxford5k")
X, Q = superglobal.extract(model, data.database), superglobal.extract(model, data.queries)
scores, ids = superglobal.search(Q, X, k=400)
scores, ids = superglobal.rerank(Q, X, ids)
result = superglobal.revisited_map(Q, X, data, ids)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from superglobal.api import extract, load_model
    from superglobal.data.images import ImageItem
    from superglobal.data.revisited import load_ground_truth, revisited_set
    from superglobal.errors import InputError
    from superglobal.models.attach import attach
    from superglobal.models.network import RetrievalNetwork
    from superglobal.retrieval.diffusion import diffuse
    from superglobal.retrieval.expansion import augment_database, expand_queries
    from superglobal.retrieval.kreciprocal import kreciprocal
    from superglobal.retrieval.mutual import rerank_mutual
    from superglobal.retrieval.rerank import rerank, rerank_candidates
    from superglobal.retrieval.scoring import revisited_map
    from superglobal.retrieval.search import merge_shortlists, search
    from superglobal.retrieval.statistics import database_statistics

# Loaded when they are asked for: timm and torchvision take seconds, and not every command needs them.
_HOMES = {
    "ImageItem": "data.images",
    "InputError": "errors",
    "RetrievalNetwork": "models.network",
    "attach": "models.attach",
    "augment_database": "retrieval.expansion",
    "database_statistics": "retrieval.statistics",
    "diffuse": "retrieval.diffusion",
    "expand_queries": "retrieval.expansion",
    "extract": "api",
    "kreciprocal": "retrieval.kreciprocal",
    "load_ground_truth": "data.revisited",
    "load_model": "api",
    "merge_shortlists": "retrieval.search",
    "rerank": "retrieval.rerank",
    "rerank_candidates": "retrieval.rerank",
    "rerank_mutual": "retrieval.mutual",
    "revisited_map": "retrieval.scoring",
    "revisited_set": "data.revisited",
    "search": "retrieval.search",
}

__version__ = "0.1.0"
__all__ = [
    "ImageItem",
    "InputError",
    "RetrievalNetwork",
    "attach",
    "augment_database",
    "database_statistics",
    "diffuse",
    "expand_queries",
    "extract",
    "kreciprocal",
    "load_ground_truth",
    "load_model",
    "merge_shortlists",
    "rerank",
    "rerank_candidates",
    "rerank_mutual",
    "revisited_map",
    "revisited_set",
    "search",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
