"""What the searches share: architectures that are sampled from one set of weights, with and without the penalty.

=================  =====================================================================================
``problem.py``     what a search space must offer
``controller.py``  the controller that samples architectures, and its training by validation rewards
``penalty.py``     the penalty over an epoch: its schedule, its running Fisher; and the way it was published
``loop.py``        one search: train the sampled architectures in turn, then the controller; time of its parts
``report.py``      what the runs say: the choice of a setting, curves over seeds, times; the tables and the figure
``command.py``     what the commands share: options, tuning, the comparison
=================  =====================================================================================
"""
