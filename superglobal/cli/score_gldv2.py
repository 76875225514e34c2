"""Score a GLDv2 submission file.

Example: superglobal score-gldv2 retrieval_solution_v2.1.csv submission.csv

The solution file contains the ground truth and determines the task, retrieval or recognition. A retrieval submission is
a CSV file with the columns id and images (up to 100 image ids, best first, separated by spaces). A recognition
submission has the columns id and landmarks (a landmark id, a space and a score). Evaluations on GLDv2 write submission
files.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str]) -> int:
    """Run `superglobal score-gldv2`, and return the exit status.

    Print mAP@100 (retrieval), or GAP and top-1 accuracy (recognition), for the public, the private and all test images.
    """
    parser = argparse.ArgumentParser(
        "superglobal score-gldv2", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "solution", type=Path, help="ground truth: retrieval_solution_v2.1.csv or recognition_solution_v2.1.csv"
    )
    parser.add_argument("submission", type=Path, help="submission file to score")
    args = parser.parse_args(arguments)
    from superglobal.metrics.gldv2 import score_submission
    from superglobal.reporting.results import print_metrics

    result = score_submission(args.solution, args.submission)
    print_metrics(f"{args.submission} scored with {args.solution.name}", {"submission": result.to_dict()})
    return 0
