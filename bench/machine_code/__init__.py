"""Machine code of the kernels without a GPU: compiled ahead of time, read, kept to a budget."""
