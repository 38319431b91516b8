"""Benchmarks against everything a user could pick instead: ``python -m lm2_kernels bench``.

``works`` says what is measured and by which rows, ``measure`` how, ``suite`` runs a selection and
``report`` and ``plots`` show it. The same works run under pytest-benchmark in ``benchmarks/``.
"""
