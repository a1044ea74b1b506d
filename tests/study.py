"A study of its own in a temporary folder: the real stage notebooks over tiny models."

import os, shutil, subprocess, sys, time
from pathlib import Path
import tiny

ROOT = Path(__file__).resolve().parents[1]
STAGES = """[stages]
sample   = nbs/4_self_align/40_sample.ipynb
generate = nbs/4_self_align/41_generate.ipynb : sample
score    = nbs/4_self_align/42_score.ipynb : sample generate

[smoke]
title  = Tiny models with random weights
scale  = random-weights
stages = sample generate score
sample.subsets = 2
sample.size    = 16
generate.steps = 12
generate.batch = 3
generate.shard = 4
"""


def make_study(root):
    "Models, notebooks and settings of a tiny study."
    from selfalign.models.reader import Reader

    models = root / "data/micro"
    tiny.open_clip_folder(models / "clip")
    tiny.siglip_folder(models / "judge")
    tiny.generator_folder(models / "generator")
    Reader().save_pretrained(models / "reader")
    shutil.copytree(ROOT / "nbs/4_self_align", root / "nbs/4_self_align", ignore=shutil.ignore_patterns(".*"))
    (root / "settings.ini").write_text(STAGES, encoding="utf-8")
    return root


# Runs in the kernel before its first cell: in the middle of writing image number COUNT it says so, and stays there.
STOP = """
import os, time
from pathlib import Path
replace, images = os.replace, []

def stop(source, target, *args, **kwargs):
    if str(target).endswith(".png"):
        images.append(target)
        if len(images) == COUNT:
            Path(EVENT).touch()
            time.sleep(3600)
    return replace(source, target, *args, **kwargs)

os.replace = stop
"""


def stopped(root, count):
    "Environment in which a stage stops within its image number `count`, and the file that appears when it does."
    event, startup = root / "stopped", root / "ipython/profile_default/startup"
    startup.mkdir(parents=True, exist_ok=True)
    code = STOP.replace("COUNT", str(count)).replace("EVENT", repr(str(event)))
    (startup / "stop.py").write_text(code, encoding="utf-8")
    return {"IPYTHONDIR": str(root / "ipython")}, event


def until(condition, process=None, seconds=300):
    "Wait for an event; fail where the process that should bring it about has ended."
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"ended before: {process.communicate()}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def start(root, run="", only=(), wait=True, env=(), force=()):
    "Run the study in a process of its own, which can be killed with all its children."
    options = f"run={run or None!r}, only={list(only)!r}, force={list(force)!r}"
    code = f'from selfalign.study.runner import run; run("smoke", {options})'
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"SELFALIGN_ROOT": str(root), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    if wait:
        out, _ = process.communicate(timeout=600)
        assert process.returncode == 0, out[-4000:]
    return process
