"""SuperGlobal (ICCV 2023) image retrieval: descriptors, search, reranking and scores in a few lines.

>>> model = load_model("CVPR2022_CVNet_R50.pyth")
>>> X, Q = extract(model, database_images), extract(model, query_images)
>>> scores, ids = search(Q, X, k=400)
>>> scores, ids = rerank(Q, X, ids)
>>> result = revisited_map(Q, X, ground_truth, ids=ids)
"""

from superglobal.api import extract, load_model
from superglobal.errors import InputError
from superglobal.models.attach import attach

__version__ = "0.1.0"
__all__ = ["InputError", "attach", "extract", "load_model"]
