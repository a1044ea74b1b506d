"What the tests share: a copy of the checkout, one thread a process, and what is expensive made once a session."

import os, shutil
from contextlib import contextmanager
from pathlib import Path
import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings
import checkout, tiny

# Whether a test passes does not depend on how busy the machine is.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

LEFT = pytest.StashKey()


def pytest_configure(config):
    "Before the workers start, so that they inherit it: the copy, and threads that do not crowd each other."
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not hasattr(config, "workerinput"):
        config.stash[LEFT] = checkout.own_files()
        os.environ["SELFALIGN_ROOT"] = str(checkout.copy_checkout())


def pytest_xdist_auto_num_workers(config):
    "`-n auto`: a worker a core, 3 GB of memory each, at most eight."
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores, psutil.virtual_memory().total // (3 * 2**30), 8))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "Notebooks take longest, so they come first: who has nothing left to do takes over tests from the end of the list."
    for item in items:
        if {"warm", "smoke_run", "ran"} & set(item.fixturenames):
            item.add_marker("slow")
    items.sort(key=lambda item: "warm" not in item.fixturenames)


def changed(config):
    "Files of the checkout's own runs and reports that came, went or changed since the session began."
    before, after = config.stash[LEFT], checkout.own_files()
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def pytest_sessionfinish(session):
    "The session fails where a test left something behind."
    if not hasattr(session.config, "workerinput") and changed(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if names := changed(config):
        terminalreporter.section("tests leave the checkout alone", sep="=", red=True)
        terminalreporter.line("These changed while the tests ran, by a test or by a run beside them:")
        for name in names[:20]:
            terminalreporter.line(f"  {name}")


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput") and LEFT in config.stash:
        shutil.rmtree(Path(os.environ["SELFALIGN_ROOT"]).parent, ignore_errors=True)


# --- made once a session, not once a worker ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def once():
    "`with once(name) as (folder, new)`: a folder all workers share; the first finds it new, the others wait for it."

    @contextmanager
    def make(name):
        shared = Path(os.environ["SELFALIGN_ROOT"]).parent / "shared"
        shared.mkdir(exist_ok=True)
        with FileLock(shared / f"{name}.lock"):
            done = shared / f"{name}.done"
            yield shared / name, not done.exists()
            done.touch()

    return make


@pytest.fixture(scope="session")
def smoke_run(once):
    "The run folder of preset `smoke`, which notebooks opened by hand take their inputs from."
    from selfalign.study.runner import run, run_folder

    with once("smoke") as (_, new):
        return run("smoke", quiet=True, wait=1800) if new else run_folder("smoke")


def model(once, name, write):
    with once(name) as (folder, new):
        return write(folder) if new else folder


@pytest.fixture(scope="session")
def tiny_clip(once):
    return model(once, "clip", tiny.open_clip_folder)


@pytest.fixture(scope="session")
def tiny_judge(once):
    return model(once, "judge", tiny.siglip_folder)


@pytest.fixture(scope="session")
def tiny_hf_clip(once):
    return model(once, "hf_clip", tiny.hf_clip_folder)


@pytest.fixture(scope="session")
def tiny_generator(once):
    return model(once, "generator", tiny.generator_folder)
