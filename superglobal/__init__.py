"""SuperGlobal (ICCV 2023) image retrieval: descriptors, search, reranking and metrics in a few lines.

model = superglobal.load_model("CVPR2022_CVNet_R50.pyth")
data = superglobal.revisited_set("data", "roxford5k")
X, Q = superglobal.extract(model, data.database), superglobal.extract(model, data.queries)
scores, ids = superglobal.search(Q, X, k=400)
scores, ids = superglobal.rerank(Q, X, ids)
result = superglobal.revisited_map(Q, X, data, ids)
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from superglobal.api import *  # noqa: F403
else:
    # The public names are in superglobal/api.py. They are imported on first use, because torch and timm take seconds.
    def _public_names():
        from importlib import import_module

        return {name: value for name, value in vars(import_module("superglobal.api")).items() if name[0] != "_"}

    def __getattr__(name):
        if name == "__all__":
            return sorted(_public_names())
        names = {} if name.startswith("_") or name == "api" else _public_names()
        if name not in names:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals().setdefault(name, names[name])

    def __dir__():
        return sorted({*globals(), *_public_names()})
