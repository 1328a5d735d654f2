"""What the searches share: architectures that are sampled from one set of weights, with and without the penalty.

=================  =====================================================================================
``problem.py``     what a search space must offer
``controller.py``  the controller that samples architectures
``reinforce.py``   its training by validation rewards
``plasticity.py``  the penalty over an epoch: when it begins, its strength, its running Fisher
``loop.py``        one search: train the sampled architectures in turn, then the controller
``forgetting.py``  what architectures lost between their own training and the end of the epoch
``clock.py``       time per part
``reference.py``   the same penalty the way it was first published, for the comparison of times
``summary.py``     what the runs say: the choice of alpha, curves, verdicts, times
``report.py``      the table, the figure, the section of the results page
``kept.py``        finished runs in files
``command.py``     the command line and the driver
=================  =====================================================================================
"""
