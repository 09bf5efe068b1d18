"""Triton kernels, one file a stage; stages share ``tiles`` and ``configs`` and nothing else."""
