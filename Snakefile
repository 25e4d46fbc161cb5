# The batch: one rule a notebook, each executed by the strict runner (python -m s2d.lab.notebook). What a notebook reads and
# writes, and the code that it needs, is read from the notebook: a new one needs its file and its parameters, no more.
#
#   snakemake --cores 2 --config scale=laptop from=store        (what `make figures` calls)
#
# scale: which notebooks/params/<scale>/ apply; laptop is the notebooks' own defaults, measured where a reader reads. At
#        the scale paper the notebooks run as on one accelerator, beside the tables that paper/Snakefile makes.
# from:  "store" uses trained checkpoints where they are stored, "scratch" trains everything anew in a store of its own.

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Read by its path, because importing the package would import torch.
source = SimpleNamespace(**runpy.run_path("s2d/lab/dependencies.py"))

SCALES = sorted(path.name for path in Path("notebooks/params").iterdir() if path.is_dir())
SCALE = config.get("scale", "laptop")
FROM = config.get("from", "store")
if SCALE not in SCALES:
    raise WorkflowError(f"SCALE={SCALE} has no parameters in notebooks/params: choose one of {', '.join(SCALES)}")
if FROM not in ("store", "scratch"):
    raise WorkflowError(f"FROM={FROM}: choose store (use trained checkpoints) or scratch (train everything anew)")

RUN = {"paper": "paper_scale"}.get(SCALE, SCALE)  # data/paper holds what the paper reports, and nothing measured
STORE = "" if FROM == "store" else str(Path("build/store-scratch").resolve())
NOTEBOOKS = sorted(path.stem for path in Path("notebooks").glob("[0-9][0-9]_*.ipynb"))
FIGURES = source.published_figures()


def executed(name):
    return f"build/{RUN}/{name}.ipynb"


def tables(names):
    """Their files; a name with a run in it (laptop/tuning) is the same at every scale."""
    return [f"data/{name}.csv" if "/" in name else f"data/{RUN}/{name}.csv" for name in names]


def draws(code):
    """Whether a notebook publishes figures; the others only show them, and do not run again for a colour."""
    return "s2d.lab.figures.registry" in source.imported_modules(code)


def inputs(name):
    """The notebook and its parameters, the code it needs, the tables it reads."""
    code = source.notebook_code(f"notebooks/{name}.ipynb")
    files = source.closure(source.imported_modules(code), without=() if draws(code) else source.DRAWING)
    modules = [path.relative_to(Path.cwd()).as_posix() for path in files]
    read = {*source.loaded_tables(code), *(table for drawn in FIGURES.values() if draws(code) for table in drawn)}
    reported = sorted(map(str, Path("data/paper").glob("*.csv"))) if "s2d/lab/paper.py" in modules else []
    own = source.saved_tables(code)
    return [
        f"notebooks/{name}.ipynb",
        f"notebooks/params/{SCALE}/{name}.yaml",
        *modules,
        *tables(sorted(read - set(own))),
        *reported,
    ]


def outputs(name):
    """The tables that a notebook writes, and the figures.

    They stay in place while it runs, and come back if it fails: it reads the committed ones where checkpoints are
    missing.
    """
    code = source.notebook_code(f"notebooks/{name}.ipynb")
    figures = [f"figures/{RUN}/{figure}.{kind}" for figure in FIGURES for kind in ("svg", "png")]
    return [update(file) for file in tables(source.saved_tables(code)) + (figures if draws(code) else [])]


onstart:
    if SCALE == "paper":
        command = [sys.executable, "-m", "s2d.lab.paper_scale", "check", "--gpu", "--made"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise WorkflowError(done.stderr.strip().removeprefix("error: "))


rule all:
    input:
        [executed(name) for name in NOTEBOOKS],


# Notebooks share checkpoints through the store, which knows by itself what is stale. So that nothing is trained twice at
# once each takes all cores, for the checkpoints that it trains or evaluates, and runs alone; in the order of their
# numbers where there is a choice. A notebook need not run again because one before it did: changing one parameter reruns
# that notebook and the figures, and nothing else.
for place, name in enumerate(NOTEBOOKS):

    rule:
        name:
            name.partition("_")[2]
        input:
            inputs(name),
        output:
            outputs(name),
            notebook=executed(name),
        threads: workflow.cores
        priority: len(NOTEBOOKS) - place
        shell:
            f"S2D_STORE={STORE} S2D_WORKERS={workflow.cores} {sys.executable} -m s2d.lab.notebook run "
            "{input[0]} {output.notebook} --params {input[1]}"
