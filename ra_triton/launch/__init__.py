"""How a kernel is launched: configs, plans, Triton's C launcher, recorded calls."""
