"""The experiments that the method exists for, on the public API alone.

====================  =================================================================================
``two_models``        two models that share layers, trained one after the other
====================  =================================================================================

Each runs with ``python -m benchmarks.experiments.NAME``, prints a table, and writes a record (JSON) and a figure.
"""
