"""Doors into other libraries that they did not mean to be used: one file per library, each use with a test."""
