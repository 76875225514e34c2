"""Check the package on a GPU and measure its speed: python scripts/gpu_report.py [--minutes 8] [--out FOLDER].

The script needs one GPU, but no internet access and no data. Each section of the report runs in a separate process. If
a section raises an exception, the report contains a row with the error message. The script writes report.json,
report.md and one log file per section. With `--device cpu`, every section runs on the CPU with smaller inputs, which
takes one to four minutes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# With this variable, torch checks for a GPU without initializing CUDA. The processes of the sections are forked from
# this process, and CUDA does not work in a fork of a process that has initialized CUDA.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from gpu_sections.common import Report, Row, format_row

from superglobal.utils.io import write_atomically
from superglobal.utils.provenance import git_state, versions

FORMAT = "superglobal-gpu-report-1"
STATUSES = ("passed", "measured", "failed", "timeout", "skipped", "interrupted")
# Section -> fraction of the total time that it may take. The most important section comes first.
SECTIONS = {"correctness": 0.3, "extraction": 0.26, "training": 0.22, "search": 0.15, "processes": 0.07}


def main() -> int:
    """Run the chosen sections, and write the report.

    Returns:
        The exit status: 0, 1 if a check or a measurement failed, 2 if an argument is invalid, or 130 after an
        interrupt.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes",
        type=float,
        default=8,
        help="time limit in minutes (default: 8); with 15 or more, the report also measures torch.compile",
    )
    parser.add_argument("--out", type=Path, help="folder of the report (default: outputs/gpu_report/<date>)")
    parser.add_argument(
        "--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run (default: all)"
    )
    sizes = "size of the inputs: small repeats measurements less often than full; tiny is for a CPU"
    parser.add_argument("--size", choices=("full", "small", "tiny"), help=f"{sizes} (default: full, or tiny on a CPU)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to check (default: cuda)")
    args = parser.parse_args()
    card = _card() if args.device == "cuda" else {}
    args.out = args.out or Path(f"outputs/gpu_report/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    args.size = args.size or ("full" if args.device == "cuda" else "tiny")
    if problem := _problem(args, card):
        print(f"error: {problem}", file=sys.stderr)
        return 2
    # Treat SIGTERM like Ctrl+C: stop the current section, and write a report of the rows measured so far.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args.out.mkdir(parents=True, exist_ok=True)
    lines, work = args.out / "rows.jsonl", Path(tempfile.mkdtemp(prefix="gpu_report_"))
    lines.unlink(missing_ok=True)
    start, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    seconds: dict[str, float] = {}
    interrupted = False
    for number, name in enumerate(args.sections):
        remaining = sum(SECTIONS[section] for section in args.sections[number:])
        began = time.monotonic()
        deadline = began + (end - began) * SECTIONS[name] / remaining
        report = Report(name, lines.resolve(), args.device, args.size, deadline, work)
        interrupted = not _run_section(report, args.out / f"{name}.log")
        seconds[name] = time.monotonic() - began
        print(f"{name}: {seconds[name]:.0f} s, {time.monotonic() - start:.0f} s in total", flush=True)
        if interrupted:
            break
    shutil.rmtree(work, ignore_errors=True)
    rows = [Row(**json.loads(line)) for line in lines.read_text().splitlines()]
    about = {
        "format": FORMAT,
        "arguments": sys.argv[1:],
        "machine": {"processor": platform.machine(), "system": platform.system(), "cores": os.cpu_count(), **card},
        "versions": versions(),
        "git": git_state(),
        "seconds": seconds,
    }
    write_atomically(
        args.out / "report.json", json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1).encode()
    )
    write_atomically(args.out / "report.md", _markdown(about, rows).encode())
    lines.unlink()
    failed = [row for row in rows if row.status == "failed"]
    for row in failed:
        print(f"[{row.section}] {format_row(row)}")
    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), "in", args.out / "report.md")
    return 130 if interrupted else 1 if failed else 0


def _problem(args: argparse.Namespace, card: dict[str, Any]) -> str | None:
    """Return an error message if a command-line argument is invalid, and None otherwise.

    Args:
        args: arguments of the command line.
        card: facts about the first GPU, from `_card`; empty if there is no GPU.
    """
    if args.device == "cuda" and not card:
        return "nvidia-smi finds no GPU; use --device cpu to try the script"
    if not 0 < args.minutes < 1e6:
        return f"--minutes={args.minutes}: expected a positive number"
    if len(set(args.sections)) < len(args.sections):
        return f"--sections {' '.join(args.sections)}: expected each section at most once"
    if args.out.exists() and (not args.out.is_dir() or (args.out / "report.json").exists()):
        return f"--out={args.out}: expected a folder without a report; choose another folder"
    return None


def _card() -> dict[str, Any]:
    """Return a dict with the name, the driver version and the memory of the first GPU; empty if there is no GPU.

    The values come from nvidia-smi, because a process that has initialized CUDA must not be forked.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        name, driver, memory = text.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"gpu": name, "driver": driver, "gpu_memory_mib": int(memory)}


def _run_section(report: Report, log: Path) -> bool:
    """Run a section in a separate process, and kill the process if it still runs after the deadline of the section.

    The process is forked, so that it does not have to import the packages again.

    Args:
        report: report of the section, which contains its name and its deadline.
        log: file to which the output of the section is copied.

    Returns:
        False if the section was interrupted with Ctrl+C or SIGTERM, and True otherwise.
    """
    process = multiprocessing.get_context("fork").Process(target=_section, args=(report, log))
    process.start()
    status, note = "failed", ""
    try:
        process.join(max(1.0, report.left()) + 5)
        if process.is_alive():
            status, note = "timeout", "the section reached its time limit"
        elif process.exitcode:
            note = f"the process ended with exit status {process.exitcode}; see {log}"
    except KeyboardInterrupt:
        status, note = "interrupted", "the report was interrupted"
    if process.is_alive():
        with suppress(ProcessLookupError):  # The process may have ended in the meantime.
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    if note:
        report.add(report.current(), status=status, note=note)
    return status != "interrupted"


def _section(report: Report, log: Path) -> None:
    """Run one section in this process, and copy everything that the process prints to a log file and the console."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE)
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    report.run("the whole section", lambda: importlib.import_module(f"gpu_sections.{report.section}").main(report))


def _markdown(about: dict[str, Any], rows: list[Row]) -> str:
    """Return the text of report.md: one table per section, and a table of predicted and measured gains.

    Args:
        about: entries of report.json, except the rows.
        rows: rows of all sections.
    """
    machine, packages = about["machine"], about["versions"]
    card = f"{machine['gpu']} (driver {machine['driver']})" if "gpu" in machine else "no GPU"
    text = [
        f"{card}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        + f". `python scripts/gpu_report.py {' '.join(about['arguments'])}`, {sum(about['seconds'].values()):.0f} s.",
    ]
    text += [
        "",
        "`passed` and `failed` rows check the condition in the last column. `measured` rows are measurements. "
        "The note of a `skipped` row gives the reason. A `timeout` row was running when its section reached its time "
        "limit. `ratio` is the result divided by that of the baseline: larger rates and smaller times are faster.",
    ]
    for section in dict.fromkeys(row.section for row in rows):
        text += [
            "",
            f"### {section.capitalize()}",
            "",
            "| measurement | status | result | ratio | note |",
            "|---|---|---|---|---|",
        ]
        text += [_line(row) for row in rows if row.section == section]
    plan = [row for row in rows if row.predicted]
    if plan:
        text += ["", "### Plan", "", "Gains that were predicted before the measurement, and measured gains.", ""]
        text += ["| change | predicted | measured |", "|---|---|---|"]
        text += [f"| {row.name} | {row.predicted} | {_result(row)} {_ratio(row)} |" for row in plan]
    return "\n".join(text) + "\n"


def _line(row: Row) -> str:
    expected = f"expected {row.expected}" if row.expected else ""
    note = "; ".join(part for part in (expected, row.note) if part).replace("|", "/").replace("\n", " ")
    return f"| {row.name} | {row.status} | {_result(row)} | {_ratio(row)} | {note} |"


def _result(row: Row) -> str:
    digits = ".7f" if row.unit == "cosine" else ".4g"
    return "" if row.value is None else f"{row.value:{digits}} {row.unit}"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"


if __name__ == "__main__":
    sys.exit(main())
