"""Configuration files and keys: how files compose, which keys there are, and what a message says of a wrong one."""
