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
    # The public names are the names that superglobal/api.py imports. Each name is imported when it is first used,
    # because importing torch and timm takes seconds.
    def _modules():
        import ast
        from pathlib import Path

        body = ast.parse(Path(__file__).with_name("api.py").read_text(encoding="utf-8")).body
        imports = [statement for statement in body if isinstance(statement, ast.ImportFrom)]
        return {alias.asname: statement.module for statement in imports for alias in statement.names if alias.asname}

    def __getattr__(name):
        if name == "__all__":
            return sorted(_modules())
        module = None if name.startswith("_") else _modules().get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        return globals().setdefault(name, getattr(import_module(module), name))

    def __dir__():
        return sorted({*globals(), *_modules()})
