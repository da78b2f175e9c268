"""A checkpoint that turns chunks of tokens into next tokens."""
