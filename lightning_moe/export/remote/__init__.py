"""The code of an exported folder for `transformers` (``trust_remote_code=True``).

The files are copied as they are, and use torch and transformers only.
"""
