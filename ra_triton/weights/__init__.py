"""What a fused projection may be made of: columns, factors, int8, 2:4 sparse."""
