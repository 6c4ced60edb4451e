"""Secure aggregation: a server learns the sum of its clients' integers and nothing else.

This room knows integers, keys and messages, and no model, encoder or epsilon. The protocol may change here as long as sums stay exact."""
