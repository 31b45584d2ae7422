"""Kernels in Pallas, for TPUs and GPUs, which know nothing of bigjax."""
