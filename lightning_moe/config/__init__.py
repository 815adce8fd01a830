"""Configuration files and keys: how files compose, which keys there are, and the message for a wrong one."""
