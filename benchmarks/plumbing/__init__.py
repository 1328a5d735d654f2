"""What the experiments share: data, worker processes, records of runs, plot style, and training in sequence."""
