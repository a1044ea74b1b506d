"A copy of the checkout for one session of tests: what they run reads and leaves nothing in the real one."

import os, shutil, subprocess, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("selfalign", "tests")  # the package is imported from where it is installed


def tracked():
    "Files that git keeps or would keep; without git, all that are neither hidden nor a run's."
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
        found = [ROOT / name for name in names if name]
    else:
        found = [p for p in ROOT.rglob("*") if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
        found = [p for p in found if not p.is_relative_to(ROOT / "data") or p.is_relative_to(ROOT / "data/micro")]
    return [p for p in found if p.is_file()]


def copy_checkout():
    "A temporary folder with notebooks, settings, micro models and committed reports, and no run."
    there = Path(tempfile.mkdtemp(prefix="selfalign-tests-")).resolve() / "checkout"
    for path in tracked():
        place = path.relative_to(ROOT)
        if place.parts[0] not in OUTSIDE:
            (there / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, there / place)
    return there


def own_files():
    "What lies in the checkout's own runs and reports: size and time of every file."
    found = {}
    for folder in ("data/runs", "reports"):
        for here, _, names in os.walk(ROOT / folder):
            for path in (Path(here, name) for name in names):
                if path.exists():
                    found[path.relative_to(ROOT).as_posix()] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found
