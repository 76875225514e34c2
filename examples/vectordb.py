"""A vector database finds, superglobal reranks: python examples/vectordb.py photos query.jpg (extra [vectordb]).

Qdrant runs inside this process and keeps its vectors under --place; what is written here is the same against a server
(QdrantClient(url=...)) and much the same against another database: the one thing needed of it is to give the vectors
of what it found.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import uuid
from pathlib import Path

import superglobal
from superglobal.data.folder import folder_set

MAX_SIDE = 1024


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="folder")
    parser.add_argument("query", type=Path, help="a photo")
    parser.add_argument("--weights", default="package", help="as eval.py takes them")
    parser.add_argument("--place", type=Path, default=Path("outputs/vectordb"), help="folder of the database")
    parser.add_argument("--M", type=int, default=400, help="results that are reranked")
    parser.add_argument("--show", type=int, default=5)
    return parser


def main() -> int:
    """Exit status 2 for what a user can mend."""
    try:
        run(_parser().parse_args())
    except superglobal.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Bring the collection up to date with the folder, search, rerank, print both lists.

    Raises:
        InputError: no photos, unreadable ones, no Qdrant.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise superglobal.InputError("Qdrant's client is not installed; pip install -e '.[vectordb]'") from error
    data = folder_set(args.photos, args.query)
    model = superglobal.load_model(args.weights)
    # Vectors of other weights or settings must never meet: each network has a collection of its own.
    collection = hashlib.sha256(repr((model.identity(), MAX_SIDE)).encode()).hexdigest()[:16]
    try:
        client = QdrantClient(path=str(args.place))
    except RuntimeError as error:  # another process has it
        raise superglobal.InputError(f"{args.place}: {error}") from error
    try:
        fill(client, collection, model, [item.path for item in data.database])
        query = superglobal.extract(model, args.query, max_side=MAX_SIDE)[0]
        answer = client.query_points(collection, query.tolist(), limit=args.M, with_vectors=True).points
    finally:
        client.close()
    names = [point.payload["name"] for point in answer]
    vectors = [point.vector for point in answer]
    scores, order = superglobal.rerank_candidates(query, vectors)
    print(f"rank {'found by the database':50}  after reranking")
    for rank in range(min(args.show, len(names))):
        before = f"{names[rank]} {answer[rank].score:.4f}"
        print(f"{rank + 1:4} {before:50}  {names[order[rank]]} {scores[rank]:.4f}")


def fill(client, collection: str, model: superglobal.RetrievalNetwork, photos: list[Path]) -> None:
    """Describe the photos that the collection lacks, and remove the points of those that are gone or have changed."""
    from qdrant_client.models import Distance, PointStruct, VectorParams

    if not client.collection_exists(collection):
        # Of unit vectors the inner product is the cosine, and Qdrant does not normalise them once more.
        client.create_collection(collection, VectorParams(size=model.dim, distance=Distance.DOT))
    wanted = {point_id(photo): photo for photo in photos}
    there = {point.id for point in client.scroll(collection, limit=10**9, with_payload=False)[0]}
    if gone := there - wanted.keys():
        client.delete(collection, list(gone))
    new = {key: photo for key, photo in wanted.items() if key not in there}
    print(f"{len(photos)} photos, {len(new)} to describe", flush=True)
    for key, photo in new.items():
        vector = superglobal.extract(model, photo, max_side=MAX_SIDE)[0]
        client.upsert(collection, [PointStruct(id=key, vector=vector.tolist(), payload={"name": str(photo)})])


def point_id(photo: Path) -> str:
    """The same for the same content at the same place."""
    content = hashlib.sha256(photo.read_bytes()).hexdigest()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{photo.resolve()} {content}"))


if __name__ == "__main__":
    sys.exit(main())
