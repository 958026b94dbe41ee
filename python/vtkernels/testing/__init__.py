"""What our own tests and benchmarks use, shipped so that users can rerun our numbers."""
