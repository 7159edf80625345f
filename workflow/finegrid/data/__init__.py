"""Data strategy: import, clean and tokenise a data set, losing nothing silently."""
