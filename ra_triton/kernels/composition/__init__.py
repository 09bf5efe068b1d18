"""The kernels that compose a weight from its factors."""
