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
    from superglobal.data.images import ImageItem
    from superglobal.data.revisited import load_ground_truth, revisited_set
    from superglobal.errors import InputError
    from superglobal.metrics.evaluate import revisited_map
    from superglobal.models.attach import attach
    from superglobal.models.extract import extract
    from superglobal.models.factory import load_model
    from superglobal.models.network import RetrievalNetwork
    from superglobal.reranking.diffusion import diffuse
    from superglobal.reranking.kreciprocal import kreciprocal
    from superglobal.reranking.mutual import rerank_mutual
    from superglobal.reranking.query_expansion import augment_database, expand_queries
    from superglobal.reranking.superglobal import rerank, rerank_candidates
    from superglobal.retrieval.search import merge_shortlists, search
    from superglobal.retrieval.whitening import database_statistics

# Loaded when they are asked for: timm and torchvision take seconds, and not every command needs them.
_HOMES = {
    "ImageItem": "data.images",
    "InputError": "errors",
    "RetrievalNetwork": "models.network",
    "attach": "models.attach",
    "augment_database": "reranking.query_expansion",
    "database_statistics": "retrieval.whitening",
    "diffuse": "reranking.diffusion",
    "expand_queries": "reranking.query_expansion",
    "extract": "models.extract",
    "kreciprocal": "reranking.kreciprocal",
    "load_ground_truth": "data.revisited",
    "load_model": "models.factory",
    "merge_shortlists": "retrieval.search",
    "rerank": "reranking.superglobal",
    "rerank_candidates": "reranking.superglobal",
    "rerank_mutual": "reranking.mutual",
    "revisited_map": "metrics.evaluate",
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
