"""What was pruned, per request: counted in the worker, carried to the response and the metrics."""
