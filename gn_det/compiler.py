"""Compile a C++ file of the package, if a compiler is installed, and load it.

A file is compiled for this CPU at its first use (a few seconds) and cached in ``~/.cache/gn_det_kernels``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")


def load(source: Path, fallback: str) -> ctypes.CDLL | None:
    """Return the library of ``source``, or None after logging why, and ``fallback``: what is done instead."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))), None)
    if compiler is None:
        logger.info("No C++ compiler (c++, g++, clang++): %s, which takes longer.", fallback)
        return None
    try:
        return ctypes.CDLL(os.fspath(_build(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = output.strip().splitlines()[-1][:200] if output.strip() else type(error).__name__
        logger.warning("%s cannot build gn_det's %s (%s): %s.", compiler, source.name, reason, fallback)
        return None


def _build(source: Path, compiler: str) -> Path:
    """Return the shared library for this source, compiler and CPU; other processes may build it at the same time."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True, timeout=30).stdout
    # Machines that share a home directory must not load each other's code.
    machine = (platform.machine(), *sorted(cpu_features() or {platform.processor()}))
    parts = (source.read_text(), version, str(_FLAGS), *machine)
    folder = private_folder()
    library = folder / f"{source.stem}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.so"
    if library.is_file():
        return library
    made = folder / f"{library.name}.{os.getpid()}"
    command = [compiler, *_FLAGS, os.fspath(source), "-o", os.fspath(made)]
    logger.info("Compiling gn_det's %s once (%s).", source.name, compiler)
    try:
        done = subprocess.run([*command, "-fopenmp"], check=False, capture_output=True, timeout=300)
        if done.returncode:  # perhaps it has no OpenMP: one thread
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, library)
    finally:
        made.unlink(missing_ok=True)
    return library


def private_folder() -> Path:
    """Return a folder that only this user can write to, because code is loaded from it."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gn_det_kernels"
    with suppress(OSError):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(cache, os.W_OK):
            return cache
    return Path(tempfile.mkdtemp(prefix="gn_det-"))


@functools.cache
def cpu_features() -> frozenset[str]:
    """Return the features that Linux reports for this CPU; empty on other systems."""
    return frozenset(cpu_info("flags", "Features").split())


def cpu_info(*names: str) -> str:
    """Return the first of the named entries of Linux's /proc/cpuinfo; "" on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(names)), "")
