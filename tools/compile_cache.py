"""Triton's compile cache: a folder while a GPU job runs, one archive between two jobs."""

from __future__ import annotations

import json
import shutil
import time
import zipfile
from pathlib import Path

# What Triton reads back: a kernel, its metadata, a launcher. The intermediate stages are four fifths of an entry.
KEPT = (".cubin", ".hsaco", ".json", ".so")
BINARIES = (".cubin", ".hsaco")


def kernels(folder: Path) -> int:
    """The number of kernels compiled there."""
    return sum(path.suffix in BINARIES for path in folder.glob("*/*"))


def pack(folder: Path, archive: Path, largest: int) -> str:
    """Pack entries in the order in which they were made, as many as fit.

    Returns what was done, in words; empty if nothing was.
    """
    began, half = time.monotonic(), archive.with_name(f".{archive.name}.half")
    entries = sorted((entry for entry in folder.iterdir() if entry.is_dir()), key=lambda entry: entry.stat().st_mtime)
    if not kernels(folder):
        return ""
    left_out = 0
    with half.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for entry in entries:
            files = [path for path in entry.iterdir() if path.suffix in KEPT and path.is_file()]
            # Assumes that nothing compresses, and leaves room for the directory at the end of the archive.
            if file.tell() + sum(path.stat().st_size for path in files) > 0.95 * largest:
                left_out += 1
                continue
            for path in files:
                packed.write(path, f"{entry.name}/{path.name}")
    half.replace(archive)
    size, seconds = archive.stat().st_size / 2**20, time.monotonic() - began
    without = f", {left_out} entries left out" if left_out else ""
    return f"compile cache: {kernels(folder)} kernels, {size:.1f} MiB packed in {seconds:.1f} s{without}"


def unpack(archive: Path, folder: Path) -> str:
    """Unpack into an empty folder, which stays empty if the archive is damaged. Returns what was done, in words."""
    if not archive.exists():
        return "compile cache: none, a cold start"
    began = time.monotonic()
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        for path in folder.glob("*/__grp__*.json"):
            # Triton keeps where the files of an entry were, looks there, and from 3.9 on wants them all.
            files = [path.parent / name for name in json.loads(path.read_text())["child_paths"]]
            path.write_text(json.dumps({"child_paths": {file.name: str(file) for file in files if file.exists()}}))
    except Exception as error:  # from zipfile, zlib or json: a damaged archive may raise any of them
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return f"compile cache: {archive.name} is damaged, a cold start ({type(error).__name__}: {error})"
    size, seconds = archive.stat().st_size / 2**20, time.monotonic() - began
    return f"compile cache: {kernels(folder)} kernels, {size:.1f} MiB unpacked in {seconds:.1f} s"
