"""The GEMMs of the projection and of its gradients."""
