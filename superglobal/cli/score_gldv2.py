"""Score a GLDv2 submission, e.g. superglobal score-gldv2 retrieval_solution_v2.1.csv submission.csv

The solution file decides the task. Retrieval: CSV with id and images (up to 100 ids, best first, separated by spaces);
recognition: CSV with id and landmarks (a landmark_id, a space, a score). An evaluation of GLDv2 writes such a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Print mAP@100, or GAP and top-1 accuracy, for the public, the private and all test images."""
    parser = argparse.ArgumentParser(
        "superglobal score-gldv2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("solution", type=Path, help="retrieval_solution_v2.1.csv or recognition_solution_v2.1.csv")
    parser.add_argument("submission", type=Path, help="file to score")
    args = parser.parse_args(arguments)
    from superglobal.metrics.gldv2 import score_submission
    from superglobal.reporting.results import print_metrics

    result = score_submission(args.solution, args.submission)
    print_metrics(f"{args.submission} by {args.solution.name}", {"submission": result.to_dict()})
    return 0
