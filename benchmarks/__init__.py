"""The speed of this library next to what it is compared with: ``python -m benchmarks``.

``torch.utils.benchmark`` measures, by turns (:mod:`benchmarks.timing`); the rest makes
the contenders. Functions return records of plain values; only the command prints.
"""
