"""Cases, peers and timing; gives no number for what fails its check."""

from segmamba.benchmark.record import HEADER, Record, describe_pace, table_row
from segmamba.benchmark.run import BENCHMARKS, run_benchmark
from segmamba.benchmark.settings import BenchmarkSettings

__all__ = [
    "BENCHMARKS",
    "HEADER",
    "BenchmarkSettings",
    "Record",
    "describe_pace",
    "run_benchmark",
    "table_row",
]
