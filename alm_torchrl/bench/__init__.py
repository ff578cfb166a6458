"""The speed of this library, measured side by side with what it is compared to.

``alm-torchrl bench`` runs :func:`~alm_torchrl.bench.suite.run_bench`. All functions
return records and none prints.
"""
