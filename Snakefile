# The batch: one rule a notebook, each executed by the strict runner (python -m s2d.lab.notebook).
#
#   snakemake --cores 2 --config scale=laptop from=store        (what `make figures` calls)
#
# scale: which notebooks/params/<scale>/ apply; laptop is the notebooks' own defaults.
# from:  "store" uses trained checkpoints where they are stored, "scratch" trains everything anew in a store of its own.

import sys
from pathlib import Path

SCALES = sorted(path.name for path in Path("notebooks/params").iterdir() if path.is_dir())
SCALE = config.get("scale", "laptop")
FROM = config.get("from", "store")
if SCALE not in SCALES:
    raise WorkflowError(f"SCALE={SCALE} has no parameters in notebooks/params: choose one of {', '.join(SCALES)}")
if FROM not in ("store", "scratch"):
    raise WorkflowError(f"FROM={FROM}: choose store (use trained checkpoints) or scratch (train everything anew)")

STORE = "" if FROM == "store" else str(Path("build/store-scratch").resolve())
# Training uses every core; a notebook that only evaluates uses one.
TRAINING_THREADS = workflow.cores if FROM == "scratch" or SCALE != "laptop" else 1

CORE = [f"s2d/{name}.py" for name in ("bound", "layers", "outliers", "pcdr", "regularizer", "spectral")]
PTQ = sorted(map(str, Path("s2d/ptq").glob("*.py")))
LAB = [f"s2d/lab/{name}.py" for name in (
    "data", "evaluate", "files", "models", "notebook", "paths", "recipes", "results", "session", "store", "training",
)]


def executed(name):
    return f"build/{SCALE}/{name}.ipynb"


def tables(*names):
    return [f"data/{SCALE}/{name}.csv" for name in names]


def sources(name):
    """What every notebook depends on: itself, its parameters, the code."""
    return [f"notebooks/{name}.ipynb", f"notebooks/params/{SCALE}/{name}.yaml", *CORE, *PTQ, *LAB]


RUN = (
    "S2D_STORE={params.store} S2D_WORKERS={workflow.cores} "
    + sys.executable
    + " -m s2d.lab.notebook run {input[0]} {output.notebook} --params {input[1]}"
)

TABLES = {
    "01_outlier_origins": ["origins_history", "origins_outliers", "origins_histogram", "origins_ptq"],
    "02_bound_and_pcdr": ["bound", "pcdr_layers"],
    "03_s2d_finetuning": ["finetuning_layers", "finetuning_spectra", "finetuning_outliers"],
    "04_ptq_evaluation": ["ptq"],
}
