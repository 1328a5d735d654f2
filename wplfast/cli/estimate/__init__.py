"""What ``wplfast fisher`` is made of.

``sources`` turns the options into a :class:`~.problem.Problem`: a model, its batches and a loss. Files go through
``records`` (JSONL, CSV, Parquet, text), a task (``language``, ``classification``) and ``batches``; a user's functions
through ``functions``. ``resumable`` runs the pass in portions and keeps what is done in a file, ``ranks`` divides it
among processes.
"""
