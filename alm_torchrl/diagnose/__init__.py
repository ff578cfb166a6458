"""The ``diagnose`` command: tables and pictures of what an agent has learned.

The measurements themselves are in :mod:`alm_torchrl.diagnostics`.
"""
