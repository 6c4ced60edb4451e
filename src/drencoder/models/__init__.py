"""The base model, LoRA on it, the layout of adapter values, and what a client computes from its own records.

A new way to train a client is added here. Nothing here knows rounds, codes or privacy."""
