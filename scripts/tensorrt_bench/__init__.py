"""What ``scripts/bench_tensorrt.py`` is made of."""
