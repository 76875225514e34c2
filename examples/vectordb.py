"""Search a vector database and rerank the results with superglobal: python examples/vectordb.py images query.jpg.

Install Qdrant with `pip install qdrant-client` first. In this example, Qdrant runs inside this process and stores the
descriptors in --folder. To use a Qdrant server, change only QdrantClient(path=...) to QdrantClient(url=...). The code
is similar for any vector database that returns the vectors of its results.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import uuid
from pathlib import Path

import numpy as np

import superglobal

MAX_SIDE = 1024
SAMPLE = 10_000  # number of vectors in the database of which the mean is computed


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("query", type=Path, help="query image")
    parser.add_argument(
        "--weights", default="package", help="weights of the network; takes the same values as weights= in eval.py"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/vectordb"), help="folder in which Qdrant stores the descriptors"
    )
    parser.add_argument("--M", type=int, default=400, help="number of results to rerank")
    parser.add_argument("--show", type=int, default=5, help="number of results to print")
    return parser


def main() -> int:
    """Run the example, and return the exit status of the script: 0, or 2 after an InputError."""
    try:
        run(_parser().parse_args())
    except superglobal.InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> None:
    """Update the database with the images of the folder, search it, rerank the results, and print them.

    The results before and after reranking are printed side by side.

    Args:
        args: arguments of the command line, see `_parser`.

    Raises:
        InputError: there are no images, an image cannot be read, Qdrant is not installed, or the database is in use.
    """
    try:
        from qdrant_client import QdrantClient
    except ImportError as error:
        raise superglobal.InputError(
            "the package qdrant-client is not installed; install it: pip install qdrant-client"
        ) from error
    data = superglobal.folder_set(args.images, args.query)
    model = superglobal.load_model(args.weights)
    # Descriptors of different weights or settings cannot be compared, so each network has a separate collection.
    collection = hashlib.sha256(repr((model.identity(), MAX_SIDE)).encode()).hexdigest()[:16]
    try:
        client = QdrantClient(path=str(args.folder))
    except RuntimeError as error:  # Another process is using the folder.
        raise superglobal.InputError(f"{args.folder}: {error}") from error
    try:
        update(client, collection, model, [item.path for item in data.database])
        query = superglobal.extract(model, args.query, max_side=MAX_SIDE)[0]
        sample, _ = client.scroll(collection, limit=SAMPLE, with_vectors=True)
        center = superglobal.Whitening("center").fit(np.array([point.vector for point in sample], np.float32))
        points = client.query_points(collection, query.tolist(), limit=args.M, with_vectors=True).points
    finally:
        client.close()
    names = [point.payload["name"] for point in points]
    if len(points) < 2:
        raise superglobal.InputError(f"{args.images}: expected at least two images")
    candidates = center.transform(np.array([point.vector for point in points], np.float32))
    scores, order = superglobal.rerank_candidates(center.transform(query[None])[0], candidates, method="auto")
    print(f"rank {'from the database':50}  after reranking")
    for rank in range(min(args.show, len(names))):
        before = f"{names[rank]} {points[rank].score:.4f}"
        print(f"{rank + 1:4} {before:50}  {names[order[rank]]} {scores[rank]:.4f}")


def update(client, collection: str, model: superglobal.RetrievalNetwork, images: list[Path]) -> None:
    """Update a collection of descriptors to match the current images.

    Images that are not in the collection are added, and images that were deleted are removed from it. An image that was
    changed is removed and added again.

    Args:
        client: client of the Qdrant database.
        collection: name of the collection, which is created if it does not exist.
        model: network that extracts the descriptors.
        images: all images that the collection is to contain.
    """
    from qdrant_client.models import Distance, PointStruct, VectorParams

    if not client.collection_exists(collection):
        # The descriptors have unit norm, so their inner product is the cosine. COSINE would normalize them again.
        client.create_collection(collection, VectorParams(size=model.dim, distance=Distance.DOT))
    current = {point_id(path): path for path in images}
    stored = {point.id for point in client.scroll(collection, limit=10**9, with_payload=False)[0]}
    if removed := stored - current.keys():
        client.delete(collection, list(removed))
    new = {key: path for key, path in current.items() if key not in stored}
    print(f"{len(images)} images, {len(new)} to extract", flush=True)
    for key, path in new.items():
        vector = superglobal.extract(model, path, max_side=MAX_SIDE)[0]
        client.upsert(collection, [PointStruct(id=key, vector=vector.tolist(), payload={"name": str(path)})])


def point_id(path: Path) -> str:
    """Return the id of an image in the database, a UUID. A change of the image's path or content changes the id."""
    content = hashlib.sha256(path.read_bytes()).hexdigest()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{path.resolve()} {content}"))


if __name__ == "__main__":
    sys.exit(main())
