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

REPORTED = sorted(map(str, Path("data/paper").glob("*.csv")))
CORE = [f"s2d/{name}.py" for name in (
    "bound", "console", "distributed", "files", "layers", "outliers", "pcdr", "regularizer", "spectral", "watch",
)]
PTQ = sorted(map(str, Path("s2d/ptq").glob("*.py")))
LAB = [f"s2d/lab/{name}.py" for name in (
    "data", "evaluate", "files", "models", "optimizers", "paired", "pareto", "paths", "plotting", "qat",
    "quantization", "recipes", "results", "session", "store", "training",
)]
LAB += sorted(map(str, Path("s2d/lab/notebook").glob("*.py")))


def executed(name):
    return f"build/{SCALE}/{name}.ipynb"


def tables(*names):
    return [f"data/{SCALE}/{name}.csv" for name in names]


def sources(name):
    """What every notebook depends on: itself, its parameters, the code."""
    return [f"notebooks/{name}.ipynb", f"notebooks/params/{SCALE}/{name}.yaml", *CORE, *PTQ, *LAB]


RUN = (
    f"S2D_STORE={STORE} S2D_WORKERS={workflow.cores} {sys.executable} -m s2d.lab.notebook run "
    "{input[0]} {output.notebook} --params {input[1]}"
)

FIGURES = [
    "origins_kurtosis", "origins_histogram", "bound_tightness", "pcdr_layers",
    "finetuning_spectra", "finetuning_layers", "ptq_accuracy", "ptq_methods", "ptq_conditioning", "ptq_qat",
    "origins_interventions", "origins_doses", "origins_where", "origins_growth",
    "ablations", "selection", "staleness", "overshoot",
    "frontier_search", "frontier_test", "frontier_sites", "measured_and_reported", "claims",
]


rule all:
    input:
        executed("08_figures"),


rule outlier_origins:
    input:
        sources("01_outlier_origins"),
    output:
        tables("origins_history", "origins_outliers", "origins_histogram", "origins_ptq"),
        notebook=executed("01_outlier_origins"),
    threads: TRAINING_THREADS
    shell:
        RUN


# Notebooks share checkpoints through the store, which knows by itself what is stale. So that nothing is trained twice at
# once a rule waits for the one whose checkpoints it starts from; but it need not run again because that one did
# ("ancient"): changing one parameter reruns that notebook and the figures, and nothing else.
rule bound_and_pcdr:
    input:
        sources("02_bound_and_pcdr"),
        ancient(executed("01_outlier_origins")),
    output:
        tables("bound", "pcdr_layers"),
        notebook=executed("02_bound_and_pcdr"),
    shell:
        RUN


rule s2d_finetuning:
    input:
        sources("03_s2d_finetuning"),
        ancient(executed("01_outlier_origins")),
    output:
        tables("finetuning_layers", "finetuning_spectra", "finetuning_outliers"),
        notebook=executed("03_s2d_finetuning"),
    threads: TRAINING_THREADS
    shell:
        RUN


rule ptq_evaluation:
    input:
        sources("04_ptq_evaluation"),
        ancient(executed("03_s2d_finetuning")),
    output:
        tables("ptq", "ptq_methods", "ptq_conditioning", "ptq_qat", "ptq_int8"),
        notebook=executed("04_ptq_evaluation"),
    threads: workflow.cores  # the checkpoints are shared out over all cores
    shell:
        RUN


# The evidence: other seeds and other optimizers.
rule origin_evidence:
    input:
        sources("05_origin_evidence"),
        ancient(executed("01_outlier_origins")),
        "s2d/lab/origins.py",
    output:
        tables(
            "origins_interventions", "origins_interventions_history", "origins_interventions_ptq", "origins_where",
            "origins_writers", "origins_growth", "origins_correlation",
        ),
        notebook=executed("05_origin_evidence"),
    threads: workflow.cores
    shell:
        RUN


rule ablations:
    input:
        sources("06_ablations"),
        ancient(executed("01_outlier_origins")),
        "s2d/lab/ablations.py",
        "s2d/lab/staleness.py",
        REPORTED,
    output:
        tables("ablations", "ablation_differences", "ablation_layers", "selection", "staleness", "overshoot"),
        notebook=executed("06_ablations"),
    threads: workflow.cores
    shell:
        RUN


rule frontier:
    input:
        sources("07_frontier"),
        "s2d/lab/frontier.py",
        ancient(executed("06_ablations")),
        "data/laptop/tuning.csv",
    output:
        tables("frontier", "frontier_reach", "frontier_controls", "frontier_sites"),
        notebook=executed("07_frontier"),
    threads: workflow.cores
    shell:
        RUN


rule figures:
    input:
        sources("08_figures"),
        "s2d/lab/ablations.py",
        "s2d/lab/claims.py",
        "s2d/lab/frontier.py",
        "s2d/lab/origins.py",
        "s2d/lab/paper.py",
        rules.outlier_origins.output,
        rules.bound_and_pcdr.output,
        rules.s2d_finetuning.output,
        rules.ptq_evaluation.output,
        rules.origin_evidence.output,
        rules.ablations.output,
        rules.frontier.output,
        "data/laptop/tuning.csv",
        REPORTED,
    output:
        tables("claims"),
        expand("figures/{scale}/{name}.{kind}", scale=SCALE, name=FIGURES, kind=["svg", "png"]),
        notebook=executed("08_figures"),
    shell:
        RUN
