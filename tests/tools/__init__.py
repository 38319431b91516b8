"""Test-only tools: run and check Triton kernels on a machine without a GPU."""
