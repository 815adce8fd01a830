"""How results are shown: text, Markdown and CSV tables, and figures in one style."""
