"""Prove the GPU path and measure it: python scripts/gpu_report.py [--minutes 8] [--out outputs/gpu_report]

Runs on one GPU without network or data. Each section runs in a process of its own; an exception becomes a row. Writes
report.json, report.md and one log per section. `--device cpu --size tiny` runs every section on a CPU in a minute.
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# Asking for a GPU must not initialize CUDA in this process: the sections' processes are forked from it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from gpu_sections.common import Report, Row, format_row

from superglobal.files import write_atomically
from superglobal.reporting.report import git_state, versions

FORMAT = "superglobal-gpu-report-1"
# In the order of their value, with the share of the time that each may take.
SECTIONS = {"correctness": 0.3, "extraction": 0.26, "training": 0.22, "search": 0.15, "processes": 0.07}


def main() -> int:
    """Run the chosen sections; exit status 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="time for everything (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu_report"), help="folder of the report")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--size", choices=("full", "small", "tiny"), default="full", help="tiny is for a CPU")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    card = _card() if args.device == "cuda" else {}
    if args.device == "cuda" and not card:
        print("error: nvidia-smi finds no GPU; use --device cpu --size tiny to try the script", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    lines, work = args.out / "rows.jsonl", Path(tempfile.mkdtemp(prefix="gpu_report_"))
    lines.unlink(missing_ok=True)
    start, end = time.monotonic(), time.monotonic() + 60 * args.minutes
    seconds: dict[str, float] = {}
    for number, name in enumerate(args.sections):
        rest = sum(SECTIONS[other] for other in args.sections[number:])
        began = time.monotonic()
        deadline = began + (end - began) * SECTIONS[name] / rest
        _run_section(Report(name, lines.resolve(), args.device, args.size, deadline, work), args.out / f"{name}.log")
        seconds[name] = time.monotonic() - began
        print(f"{name}: {seconds[name]:.0f} s, {time.monotonic() - start:.0f} s in all", flush=True)
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
    counts = {
        status: sum(row.status == status for row in rows) for status in ("passed", "measured", "failed", "skipped")
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()), "in", args.out / "report.md")
    return 1 if failed else 0


def _card() -> dict[str, Any]:
    """Return name, driver and memory of the first GPU without initializing CUDA, which a fork would not survive."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout
        name, driver, memory = text.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"gpu": name, "driver": driver, "gpu_memory_mib": int(memory)}


def _run_section(report: Report, log: Path) -> None:
    """Run a section in a forked process, which has everything imported already, and end it at its deadline."""
    process = multiprocessing.get_context("fork").Process(target=_section, args=(report, log))
    process.start()
    process.join(max(1.0, report.left()) + 5)
    note = ""
    if process.is_alive():
        note = "the section was still running at the end of its time"
        os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    elif process.exitcode:
        note = f"the process ended with {process.exitcode}; see {log}"
    if note:
        report.add("the whole section", status="failed", note=note)


def _section(report: Report, log: Path) -> None:
    """Run one section, its output in a log file as well as on the console."""
    os.setsid()
    tee = subprocess.Popen(["tee", str(log)], stdin=subprocess.PIPE)
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    report.run("the whole section", lambda: importlib.import_module(f"gpu_sections.{report.section}").main(report))


def _markdown(about: dict[str, Any], rows: list[Row]) -> str:
    machine, packages = about["machine"], about["versions"]
    card = f"{machine['gpu']} (driver {machine['driver']})" if "gpu" in machine else "no GPU"
    text = [
        f"{card}, {machine['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        + f". `python scripts/gpu_report.py {' '.join(about['arguments'])}`, {sum(about['seconds'].values()):.0f} s.",
    ]
    for section in dict.fromkeys(row.section for row in rows):
        text += [
            "",
            f"### {section.capitalize()}",
            "",
            "| what | status | result | against | note |",
            "|---|---|---|---|---|",
        ]
        text += [_line(row) for row in rows if row.section == section]
    plan = [row for row in rows if row.predicted]
    if plan:
        text += ["", "### Plan", "", "| change | predicted | measured |", "|---|---|---|"]
        text += [f"| {row.name} | {row.predicted} | {_result(row)} {_against(row)} |" for row in plan]
    return "\n".join(text) + "\n"


def _line(row: Row) -> str:
    note = "; ".join(part for part in (row.expected, row.note) if part).replace("|", "/").replace("\n", " ")
    return f"| {row.name} | {row.status} | {_result(row)} | {_against(row)} | {note} |"


def _result(row: Row) -> str:
    return "" if row.value is None else f"{row.value:.4g} {row.unit}"


def _against(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"


if __name__ == "__main__":
    sys.exit(main())
