"""What all experiments share, from the command line to the figure.

=================  =====================================================================================
``options.py``     options of the command line, made from the fields of settings
``command.py``     one experiment's command: check, run, write the record, draw, print
``runner.py``      independent jobs on all cores, with progress; finished ones are kept to go on from
``statistics.py``  what many runs come to: the choice on validation data, mean and spread, differences
``tables.py``      a table, as text and as markdown
``drawing.py``     what the figures have in common
``training.py``    minibatches in a seed's order, a step, the batch-squared Fisher
=================  =====================================================================================
"""
