"""Run, refresh and check notebooks strictly.

papermill executes the cells, but alone it lets a misspelled parameter, a dead kernel or a ``sys.exit(0)`` pass for a
success. Here every parameter is checked before anything runs, the notebook itself has to report that it reached its
end (:func:`complete`), and the output file appears whole or not at all::

    python -m s2d.lab.notebook run notebooks/01_origins.ipynb out/01_origins.ipynb --params params/smoke/01_origins.yaml
    python -m s2d.lab.notebook refresh notebooks/01_origins.ipynb
    python -m s2d.lab.notebook check notebooks/*.ipynb

Exit codes: 0 all well; 1 a notebook failed or has findings; 2 bad input, nothing was executed; 130 interrupted.

The kernel is always the Python that runs this module, and it works in the folder of the source notebook, as under
nbval and in JupyterLab.

Paper: none
"""

# Notebooks import this package for `complete`: nbformat, papermill and yaml are imported where they are used.
from s2d.lab.notebook.check import check_notebook
from s2d.lab.notebook.complete import complete
from s2d.lab.notebook.parameters import read_parameters
from s2d.lab.notebook.run import NotebookError, refresh_notebook, run_notebook

__all__ = ["NotebookError", "check_notebook", "complete", "read_parameters", "refresh_notebook", "run_notebook"]
