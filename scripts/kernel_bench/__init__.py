"""What ``bench_kernels.py`` measures: one module a family, each with ``cases(ceilings)``."""
