"""The parts of ``scripts.benchmark_strategies``: what is compared, on a rank, on several."""
