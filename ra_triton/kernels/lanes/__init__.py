"""What stands between projection and attention: lane exchange, norm, rotation, cache."""
