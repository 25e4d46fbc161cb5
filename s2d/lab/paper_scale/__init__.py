"""The paper's own tables, at its own scale: which trainings and measurements they take, and the tables they make.

:mod:`~s2d.lab.paper_scale.experiments` plans (read by ``paper/Snakefile``, on the standard library alone),
:mod:`~s2d.lab.paper_scale.requirements` says what is missing, :mod:`~s2d.lab.paper_scale.merge` makes the tables and
sets them beside the paper's, :mod:`~s2d.lab.paper_scale.hours` says what it takes.
"""
