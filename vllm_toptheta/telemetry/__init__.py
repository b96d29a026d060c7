"""What was pruned, per request: counted in the worker, carried with the step's output to the response."""
