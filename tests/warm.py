"Run notebooks in processes that have the stack imported: a server imports it once and forks a child for each."

import multiprocessing, os, sys, tempfile
from pathlib import Path

STACK = """numpy pandas pyarrow.parquet PIL.Image scipy.stats sklearn.linear_model sklearn.metrics statsmodels.api
matplotlib.pyplot matplotlib_inline.backend_inline seaborn torch torchvision.transforms torchmetrics open_clip timm
transformers transformers.models.clip.modeling_clip transformers.models.siglip.modeling_siglip transformers.generation
diffusers diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion peft accelerate safetensors.torch webdataset
IPython execnb.shell nbdev.test nbconvert papermill typer rich tqdm.auto fastcore.all bs4 jinja2""".split()

CAN_FORK = "forkserver" in multiprocessing.get_all_start_methods()


def _child(notebook, log, env, tests):
    "What `nbdev-test notebook` does, here; its output goes to `log`, and it exits with its status."
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(out, number)
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    sys.path[:] = [p for p in sys.path if not p or Path(p).resolve() != Path(tests)]
    sys.argv = ["nbdev-test", notebook]
    import torch
    from nbdev.test import nbdev_test

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    nbdev_test(path=notebook)


class Warm:
    "The server's door. It ends with the process that opened it."

    def __init__(self):
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(STACK)

    def __call__(
        self,
        notebook,  # its path
        folder,  # an empty folder: the log, and the notebook's temporary files
        env,  # environment variables
        seconds=900,  # before it is ended
    ):  # exit status, what it printed
        log, temporary = Path(folder) / "log.txt", Path(folder) / "tmp"
        temporary.mkdir()
        env = {**env, "TMPDIR": str(temporary)}
        tests = str(Path(__file__).resolve().parent)
        child = self.context.Process(target=_child, args=(str(notebook), str(log), env, tests))
        child.start()
        child.join(seconds)
        if child.exitcode is None:
            child.kill()
            child.join()
        said = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        return child.exitcode, said
