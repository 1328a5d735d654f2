"""What the benchmarks share: records of runs, the look of plots, tables, and the parts of single benchmarks."""
