"""The experiments that the method exists for, on the public API alone.

====================  =================================================================================
``two_models``        two models that share layers, trained one after the other
``permuted_pixels``   one network on a row of tasks: what the Fisher's weights buy
``lora_domains``      a language model's adapters on a row of domains, likewise
``ewc``               one model on new data beside a new model on the same; which Fisher, and how strong
``text_search``       architecture search over recurrent cells with shared weights, on text
``image_search``      architecture search over convolution cells with shared weights, on images
``fine_tuning``       small updates with new samples and classes, some old samples, wrong labels
``demo``              not an experiment: the first two, small, with their best alphas, and what they show in words
``page``              not an experiment: refreshes the tables of ``benchmarks/RESULTS.md`` from the records
====================  =================================================================================

Each runs with ``python -m benchmarks.experiments.NAME``, prints tables, and writes a record (JSON) and figures.
``harness`` is what all of them share, ``data`` what they learn from, ``search`` what both searches share, ``row`` what
both rows of tasks share.
"""
