"""What tests and benchmarks of every kernel target share."""
