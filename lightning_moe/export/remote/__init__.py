"""The files that make an exported folder a model of its own for `transformers` (``trust_remote_code=True``).

They are copied into the folder as they are, and use torch and transformers only.
"""
