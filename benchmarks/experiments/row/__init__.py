"""What the experiments on a row of tasks share: one model learns them one after the other, with several arms.

===============  ============================================================================================
``arms.py``      what may protect earlier tasks, and which settings of it are tried
``command.py``   the options, the jobs, and what goes into the record
``training.py``  one sequence: the tasks one after the other, a consolidation after each
``summary.py``   each arm at its own best setting, with 95 % intervals over seeds
``report.py``    the table, and two figures
===============  ============================================================================================

An experiment brings its tasks and its model (``training.Course``), and says what its tasks and scores are called
(``arms.Row``).
"""
