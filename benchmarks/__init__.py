"""The speed of this library, measured side by side with what it is compared to.

``python -m benchmarks`` runs :func:`~benchmarks.suite.run_bench`. All functions
return records and none prints.
"""
