"""``make soak``: bad luck of a year in minutes, and what became of the runs that had it.

``python tests/faults/soak.py [PART ...] [--size 0.2] [--output output/soak]`` runs the named parts (all by default)
and prints a table; it stands in ``summary.txt`` of the output folder, with the parts that ran there before. ``--size``
scales the counts. Exit code 1 where anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch comes: sums of several threads have other last bits
sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.faults.soak_case import Case, Failure

#: Part: (module in tests/faults, function); imported when its turn comes.
PARTS = {
    "kills": ("soak_kills", "kills"),
    "ranks": ("soak_kills", "ranks"),
    "json": ("soak_json", "mutations"),
    "yaml": ("soak_yaml", "mutations"),
    "structures": ("soak_structures", "structures"),
    "images": ("soak_images", "mutations"),
    "weights": ("soak_weights", "structures"),
    "urls": ("soak_weights", "urls"),
    "payloads": ("soak_payloads", "mutations"),
    "disk": ("soak_disk", "disk"),
    "clock": ("soak_rest", "clock"),
    "workers": ("soak_rest", "workers"),
    "memory": ("soak_rest", "memory"),
}


def run_part(name: str, size: float, folder: Path) -> dict[str, object]:
    """Figures of one part; an unexpected exception is a failure of it, not of the program."""
    module, function = PARTS[name]
    part: Callable[[Case], None] = getattr(__import__(f"tests.faults.{module}", fromlist=[function]), function)
    start, failed = time.perf_counter(), ""
    with tempfile.TemporaryDirectory(prefix=f"soak-{name}-") as place:
        case = Case(name, size, Path(place), folder)
        try:
            part(case)
        except Failure as error:
            failed = str(error)
        except Exception as error:
            import traceback

            failed = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    seconds = time.perf_counter() - start
    return {"figures": case.figures, "seconds": round(seconds, 1), "size": size, "failed": failed,
            "date": time.strftime("%Y-%m-%d %H:%M")}  # fmt: skip


def table(found: dict[str, dict]) -> str:
    """Every figure of the parts that ran, as text."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lines = [f"make soak: {platform.system()}, python {platform.python_version()}, torch {torch.__version__}, "
             f"{cores} cores"]  # fmt: skip
    for name in (n for n in PARTS if n in found):
        part = found[name]
        size = "" if part["size"] == 1 else f", size {part['size']:g}"
        verdict = "FAILED" if part["failed"] else "passed"
        lines.append(f"\n{name}: {verdict} in {part['seconds']:.0f} s ({part['date']}{size})")
        lines += [f"  {what:58s} {value}" for what, value in part["figures"]]
        if part["failed"]:
            lines.append(f"  {part['failed']}")
    total = sum(p["seconds"] for p in found.values())
    missing = [n for n in PARTS if n not in found]
    lines.append(f"\n{len(found)} of {len(PARTS)} parts in {total / 60:.1f} minutes"
                 + (f"; not run: {', '.join(missing)}" if missing else ""))  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--size", type=float, default=1.0, help="1: full counts; 0.1: a tenth")
    parser.add_argument("--output", type=Path, default=Path("output/soak"))
    args = parser.parse_args()
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    ran = []
    for name in args.parts or PARTS:
        print(f"--- {name}", flush=True)
        ran.append(run_part(name, args.size, folder))
        (folder / f"{name}.json").write_text(json.dumps(ran[-1], indent=1))
    found = {n: json.loads(f.read_text()) for n in PARTS if (f := folder / f"{n}.json").is_file()}
    text = table(found)
    (folder / "summary.txt").write_text(text + "\n")
    print(f"\n{text}\n\nwritten to {folder / 'summary.txt'}")
    return int(any(part["failed"] for part in ran))


if __name__ == "__main__":
    sys.exit(main())
