"""Score a submission for GLDv2: python scripts/score_gldv2.py retrieval_solution_v2.1.csv submission.csv

The solution says the task. Retrieval: CSV with id and images (up to 100 ids, best first, separated by spaces);
recognition: CSV with id and landmarks (a landmark_id, a space, a score). eval.py leaves one in its results folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from superglobal.errors import InputError
from superglobal.metrics.gldv2 import score_submission
from superglobal.reporting.results import print_metrics


def main() -> int:
    """Print mAP@100, or GAP and top-1 accuracy, for the public, the private and all test images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("solution", type=Path, help="retrieval_solution_v2.1.csv or recognition_solution_v2.1.csv")
    parser.add_argument("submission", type=Path, help="the file to score")
    args = parser.parse_args()
    try:
        result = score_submission(args.solution, args.submission)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_metrics(f"{args.submission} by {args.solution.name}", {"submission": result.to_dict()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
