"""What a checkpoint carries, read as data that nobody has to trust."""
