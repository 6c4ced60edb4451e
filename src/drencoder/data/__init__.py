"""Whose record it is: readers of file formats, record schemas, owners, prompts and tokenisation.

A new file format or schema is added in this room alone. Nothing here knows adapters, privacy or transports."""
