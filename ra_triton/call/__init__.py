"""What a call is: options, offsets, norm and rotation, each checked once."""
