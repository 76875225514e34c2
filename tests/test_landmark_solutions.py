"""GLDv2's solutions and submissions: the organizers' reading rules (delf, dataset_file_io_test.py), and errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from superglobal.data.gldv2_solutions import (
    read_recognition_submission,
    read_retrieval_submission,
    read_solution,
    recognition_submission,
    retrieval_submission,
)
from superglobal.errors import InputError
from superglobal.metrics.gldv2 import score_submission

ROOT = Path(__file__).parents[1]
A, B, C, D, E = (f"0{i}23456789abcdef" for i in range(1, 6))


def x(number: int) -> str:
    """Return the id of an index image."""
    return f"fedcba98765432{number:02d}"


RETRIEVAL = (
    "id,images,Usage\n"
    f"{A},None,Ignored\n{B},{x(10)} {x(0)},Public\n{C},{x(0)},Private\n{D},{x(20)},Private\n{E},None,Ignored\n"
)
RECOGNITION = f"id,landmarks,Usage\n{A},0 12,Public\n{B},,Public\n{C},100,Ignored\n{D},1,Private\n{E},,Ignored\n"


def write(folder: Path, text: str, name: str = "solution.csv") -> Path:
    """Write a text file and return its path."""
    (folder / name).write_text(text)
    return folder / name


def test_the_organizers_retrieval_solution_is_read(tmp_path):
    solution = read_solution(write(tmp_path, RETRIEVAL))
    assert (solution.task, solution.ids.tolist()) == ("retrieval", [B.encode(), C.encode(), D.encode()])
    assert [images.tolist() for images in solution.truth] == [
        [x(10).encode(), x(0).encode()],
        [x(0).encode()],
        [x(20).encode()],
    ]
    assert {name: part.tolist() for name, part in solution.parts.items()} == {
        "public": [True, False, False],
        "private": [False, True, True],
        "all": [True] * 3,
    }
    assert solution.ignored == {A.encode(), E.encode()}


def test_the_organizers_recognition_solution_is_read(tmp_path):
    solution = read_solution(write(tmp_path, RECOGNITION))
    assert (solution.task, solution.ids.tolist()) == ("recognition", [A.encode(), B.encode(), D.encode()])
    assert [landmarks.tolist() for landmarks in solution.truth] == [[0, 12], [], [1]]
    assert solution.public.tolist() == [True, True, False]
    # A labeled image may be ignored.
    assert solution.ignored == {C.encode(), E.encode()}


def test_the_organizers_retrieval_predictions_are_read(tmp_path):
    text = f"id,images\n{A},{x(50)} \n{D},{x(60)}\n{B},{x(10)} {x(0)} {x(20)}\n\n{E},\n"
    lists = read_retrieval_submission(write(tmp_path, text, "mine.csv"), read_solution(write(tmp_path, RETRIEVAL)))
    assert [images.tolist() for images in lists] == [[x(i).encode() for i in (10, 0, 20)], [], [x(60).encode()]]


def test_the_organizers_recognition_predictions_are_read(tmp_path):
    text = f"id,landmarks\n{A},12 0.1 \n{D},0 19.0\n{B},\n\n{E},14 0.01\n"
    classes, scores = read_recognition_submission(
        write(tmp_path, text, "mine.csv"), read_solution(write(tmp_path, RECOGNITION))
    )
    assert classes.tolist() == [12, -1, 0]
    assert scores[[0, 2]].tolist() == [0.1, 19.0]
    assert np.isnan(scores[1])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("id,images\n", ["columns", "Usage"]),
        ("id,url,Usage\n", ["columns", "images or landmarks"]),
        ("", ["columns none"]),
        (f"id,images,Usage\n{A},None,Ignored\n", ["Usage of all 1 test images is Ignored"]),
        (f"id,images,Usage\n\n{A},{x(1)},Hidden\n", ["line 3", "Usage 'Hidden'", "Public, Private, Ignored"]),
        (f"id,images,Usage\n{A},{x(1)},Public\n{A},{x(2)},Private\n", ["line 3", A, "line 2"]),
        (f"id,images,Usage\n{A},None,Public\n", ["line 2", "'None'; expected an image id"]),
        (f"id,images,Usage\n{A},,Public\n", ["line 2", "no relevant images"]),
        (f"id,images,Usage\n{A},{x(1)} {x(1)},Public\n", ["line 2", x(1), "twice"]),
        (f"id,images,Usage\n{A},{x(1)}\n", ["line 2", "2 fields, expected 3"]),
        (f"id,images,Usage\n../{A},{x(1)},Public\n", ["line 2", "expected an image id"]),
        (f"id,landmarks,Usage\n{A},1 -2,Public\n", ["line 2", "'-2' is not a landmark_id"]),
        (f"id,landmarks,Usage\n{A},7 7,Public\n", ["line 2", "7 is listed twice"]),
    ],
)
def test_invalid_solutions_raise_errors_that_name_the_line(tmp_path, text, words):
    with pytest.raises(InputError) as caught:
        read_solution(write(tmp_path, text))
    for word in ["solution.csv", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("solution", "text", "words"),
    [
        (RETRIEVAL, f"id,landmarks\n{A},1 0.5\n", ["columns", "images"]),
        (RETRIEVAL, f"id,images\n{B},{x(1)}\n{B},\n", ["line 3", B, "also in line 2"]),
        (RETRIEVAL, f"id,images\n{'f' * 16},{x(1)}\n", ["line 2", "f" * 16, "solution.csv"]),
        (RETRIEVAL, f"id,images\n{B},{x(1)}  {x(2)}\n", ["line 2", "''; expected an image id"]),
        (RECOGNITION, f"id,landmarks\n{A},12\n", ["line 2", "prediction '12'"]),
        (RECOGNITION, f"id,landmarks\n{A},12 0.5 13 0.4\n", ["line 2", "expected a landmark_id, a space"]),
        (RECOGNITION, f"id,landmarks\n{A},tower 0.5\n", ["line 2", "expected a landmark_id, a space"]),
        (RECOGNITION, f"id,landmarks\n{A},12 nan\n", ["line 2", "expected a landmark_id, a space"]),
    ],
)
def test_invalid_submissions_raise_errors_that_name_the_line(tmp_path, solution, text, words):
    with pytest.raises(InputError) as caught:
        score_submission(write(tmp_path, solution), write(tmp_path, text, "mine.csv"))
    for word in ["mine.csv", *words]:
        assert word in str(caught.value)


def test_missing_and_unreadable_files_raise_errors(tmp_path):
    with pytest.raises(InputError, match=r"not found: .*none\.csv"):
        read_solution(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"id,images,Usage\n\xff\xfe")
    with pytest.raises(InputError, match=r"bytes\.csv: cannot be read"):
        read_solution(tmp_path / "bytes.csv")
    with pytest.raises(InputError, match="expected id, landmarks, Usage"):
        read_solution(write(tmp_path, RETRIEVAL), "recognition")


def test_written_submissions_are_read_back(tmp_path):
    solution = read_solution(write(tmp_path, RETRIEVAL))
    lists = [np.array([x(i).encode() for i in images], "S16") for images in ([3, 1], [], [2])]
    (tmp_path / "mine.csv").write_bytes(retrieval_submission(solution.ids, lists))
    assert [images.tolist() for images in read_retrieval_submission(tmp_path / "mine.csv", solution)] == [
        images.tolist() for images in lists
    ]

    solution = read_solution(write(tmp_path, RECOGNITION))
    scores = np.array([0.1 + 0.2, 1e-9, -2.0])
    (tmp_path / "mine.csv").write_bytes(recognition_submission(solution.ids, np.array([5, 0, 7]), scores))
    classes, read = read_recognition_submission(tmp_path / "mine.csv", solution)
    assert (classes.tolist(), read.tolist()) == ([5, 0, 7], scores.tolist())


def test_the_command_scores_a_submission_file(tmp_path):
    solution = write(tmp_path, RETRIEVAL)
    # B has two relevant images, at ranks 1 and 3; C has no hit; D has no prediction.
    submission = write(tmp_path, f"id,images\n{B},{x(0)} {x(50)} {x(10)}\n{C},{x(50)}\n", "mine.csv")
    expected = (1 + 2 / 3) / 2 / 3
    assert score_submission(solution, submission).map["all"] == pytest.approx(expected)
    command = [sys.executable, "-m", "superglobal", "score-gldv2", str(solution), str(submission)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "mAP@100" in done.stdout
    assert f"{100 * expected:.2f}" in done.stdout
    assert subprocess.run([*command[:-1], str(tmp_path / "none.csv")], capture_output=True).returncode == 2
