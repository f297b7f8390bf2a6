"""Everything that waits for a GPU, in one resumable command of at most nine minutes and without network.

Runs the steps below in the order of their value, each in a process of its own, as long as there is time; started again,
it runs what is missing. Prints a verdict for every target, writes one file with device, versions and date, and says
which entry of MEASURED_BETTER (gn_det/kernels/dispatch.py) follows from it.

    make gpu                                # or: python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 4    # some now, the rest with the next call
    python benchmarks/gpu.py --quick        # tiny, any machine: checks that it runs
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
#: Packages of which wheels must be there, by import name where that differs.
WHEELS = {
    **dict.fromkeys(("torch", "torchvision", "triton", "numpy", "fvcore", "iopath", "portalocker", "safetensors")),
    **dict.fromkeys(("pycocotools", "faster-coco-eval", "tensorboard", "matplotlib", "jinja2", "shapely", "tabulate")),
    **dict.fromkeys(("tqdm", "pytest", "msgspec")),
    **{"pyyaml": "yaml", "pillow": "PIL"},
}
#: AP of boxes and masks that quickstart reaches.
LEAST_AP = 60.0
Run = Callable[[Sequence[str], float], tuple[int | None, str]]


@dataclass(frozen=True)
class Step:
    """A command; ``seconds`` is what it is expected to take, and what must be left to start it."""

    name: str
    command: tuple[str, ...]
    seconds: int


def steps(output: Path, *, quick: bool) -> list[Step]:
    """In the order of their value."""
    device = "cpu" if quick else "cuda"
    small = ("SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "0") if quick else ()

    def script(name: str, *arguments: str) -> tuple[str, ...]:
        more = () if name == "syncs.py" else ("--output", str(output / f"{name}{'_'.join(arguments)}.json"))
        quickly = ("--quick",) if quick and name != "syncs.py" else ()
        return (sys.executable, str(FOLDER / name), "--device", device, *arguments, *more, *quickly)

    def quickstart(name: str, *keys: str) -> tuple[str, ...]:
        options = ("quickstart", "--engine", "embedded", "--output", str(output / name), "MODEL.DEVICE", device)
        return (sys.executable, "-m", "gn_det", *options, "SOLVER.AMP.ENABLED", "True", *keys, *small)

    norms = ("--dtypes", "bfloat16", "--no-compiled", "--layouts")
    step = ("--models", "fpn", "--dtypes", "bfloat16", "--batches", "2")
    tests = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(FOLDER.parent / "tests" / "kernels"))
    fused = ("MODEL.GN.FUSED", "on", "MODEL.GN.RECOMPUTE", "True")
    return [
        Step("kernel tests", tests, 60),
        Step("norms channels_last", script("group_norm.py", *norms, "channels_last"), 60),
        Step("train step", script("train_step.py", *step), 60),
        Step("quickstart bf16", quickstart("bf16"), 60),
        Step("quickstart fused", quickstart("fused", *fused), 60),
        Step("norms nchw", script("group_norm.py", *norms, "nchw"), 60),
        Step("train step channels_last", script("train_step.py", *step, "--channels-last"), 60),
        Step("train step compiled", script("train_step.py", *step, "--compile"), 90),
        Step("host waits", script("syncs.py"), 30),
    ]


def run_command(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Exit status, None if it ran out of time, and what it printed."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds, cwd=FOLDER.parent
        )
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        return None, output if isinstance(output, str) else output.decode(errors="replace")
    return done.returncode, done.stdout


def verdicts(step: Step, status: int, text: str) -> list[tuple[str, bool | None]]:
    """Targets of a step that ended, and whether each is met; None: there is no target, or it could not be judged."""
    if step.name == "kernel tests":
        last = text.strip().splitlines()[-1] if text.strip() else "no output"
        return [(f"kernel tests: {last}", status == 0 and " passed" in last)]
    if step.name.startswith("quickstart"):
        found = [float(v) for v in re.findall(r"(?:box|mask) AP (\d+\.\d+)", text)]
        return [(f"{step.name}: box and mask AP {found or 'none'}, target {LEAST_AP:g}", _reached(found))]
    judged = [line for line in text.splitlines() if line[:6] in ("met   ", "MISSED")]
    told = [(line[6:].strip(), line.startswith("met")) for line in judged]
    if told:
        return [(f"{step.name}: {what}", met) for what, met in told]
    if status:
        return [(f"{step.name}: failed", False)]
    return [(f"{step.name}: {line}", None) for line in text.splitlines() if "waits" in line or "judged" in line]


def _reached(aps: Sequence[float]) -> bool:
    return len(aps) >= 2 and min(aps[:2]) >= LEAST_AP


def measured_better(records: dict[str, Any], device: str) -> str:
    """What the norm benchmarks say about MEASURED_BETTER for bf16: both layouts, and correct kernels."""
    need = ("kernel tests", "norms channels_last", "norms nchw")
    if missing := [name for name in need if name not in records]:
        return f"MEASURED_BETTER: open, {', '.join(missing)} not run"
    decisive = [v for name in need for v in records[name]["verdicts"] if _decides(v[0])]
    if decisive and all(met for _, met in decisive):
        return f'MEASURED_BETTER: enter ("{device}", torch.bfloat16)'
    missed = [what for what, met in decisive if not met] or ["no target could be judged"]
    return f"MEASURED_BETTER: no entry for {device} ({missed[0]})"


def _decides(what: str) -> bool:
    return what.startswith("kernel tests") or " head: " in what or "all 69 norms" in what or "bit-identical" in what


def run_steps(todo: Sequence[Step], folder: Path, *, deadline: float, run: Run = run_command) -> Iterator[str]:
    """Run what is not in ``folder`` yet, until ``deadline`` on the monotonic clock; lines to print."""
    for step in todo:
        record = folder / f"{step.name.replace(' ', '_')}.step.json"
        if record.is_file():
            yield f"{step.name}: done earlier"
            continue
        left = deadline - time.monotonic()
        if left < step.seconds:
            yield f"{step.name}: not started, {max(left, 0):.0f} s are left and it takes about {step.seconds}"
            continue
        start = time.monotonic()
        status, text = run(step.command, left)
        (folder / f"{record.stem}.log").write_text(text, encoding="utf-8")
        if status is None:
            yield f"{step.name}: stopped at the time limit; the next call runs it again"
            continue
        found: dict[str, Any] = {
            "seconds": round(time.monotonic() - start, 1),
            "status": status,
            "verdicts": verdicts(step, status, text),
        }
        record.write_text(json.dumps(found), encoding="utf-8")
        for what, met in found["verdicts"]:
            yield f"{'      ' if met is None else 'met   ' if met else 'MISSED'} {what}"


def main(argv: Sequence[str] | None = None, run: Run = run_command) -> int:
    """0 if all steps ran and every target is met, 1 if not, 2 if nothing could run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time for this call (default 9)")
    parser.add_argument("--only", default="", help="steps whose names contain this")
    parser.add_argument("--folder", type=Path, default=Path("output/gpu"), help="where finished steps are kept")
    parser.add_argument("--output", type=Path, help="json file; default benchmarks/results/gpu_<device>.json")
    parser.add_argument("--quick", action="store_true", help="tiny, on the CPU: checks that it runs")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * args.minutes
    optional = ("triton",) if args.quick else ()
    missing = [w for w, name in WHEELS.items() if w not in optional and not _installed(name or w.replace("-", "_"))]
    if missing:
        print(f"missing packages: {' '.join(missing)}\nwithout network: pip install --no-index --find-links WHEELS ...")
        return 2
    sys.path.insert(0, str(FOLDER))
    import torch
    from group_norm import environment

    if not args.quick and not torch.cuda.is_available():
        print("torch finds no CUDA device: nothing was run (--quick runs it on the CPU)")
        return 2
    args.folder.mkdir(parents=True, exist_ok=True)
    todo = [step for step in steps(args.folder.resolve(), quick=args.quick) if args.only in step.name]
    for line in run_steps(todo, args.folder, deadline=deadline, run=run):
        print(line, flush=True)
    records = {}
    for step in todo:
        file = args.folder / f"{step.name.replace(' ', '_')}.step.json"
        if file.is_file():
            records[step.name] = json.loads(file.read_text(encoding="utf-8"))
    where = environment("cpu" if args.quick else "cuda")
    conclusion = measured_better(records, where["device"])
    output = args.output or FOLDER / "results" / f"gpu_{where['device'].replace(' ', '_')}.json"
    result = {"environment": where, "quick": args.quick, "steps": records, "measured_better": conclusion}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    left = len(todo) - len(records)
    print(f"{conclusion}\n{left} of {len(todo)} steps left{'; run it again' if left else ''}; written to {output}")
    met = all(ok is not False for record in records.values() for _, ok in record["verdicts"])
    return int(bool(left) or not met)


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    sys.exit(main())
