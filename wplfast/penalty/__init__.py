"""The Weight Plasticity Loss and what it is anchored to.

Parameters of the user's and Fishers by name enter; the penalty's value leaves, with its gradient by autograd or added
to ``.grad``. It may import ``ops``, ``backends``, ``fisher.result`` and the modules at the package's root.
"""

from .loss import WeightPlasticityLoss

__all__ = ["WeightPlasticityLoss"]
