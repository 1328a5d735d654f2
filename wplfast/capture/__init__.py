"""Squared per-sample gradients of any model, from one backward pass.

A model whose parameters are watched runs on a batch (``trace``); who owns which row of each output is measured
(``probe``); gradients become per-sample gradients (``rules``), which are summed over uses and squared into accumulators
(``collect``). It may import ``ops`` and ``errors``; nothing here knows of data sets or of penalties.
"""
