"""What jobs/benchmark.py measures, a module for each kind."""
