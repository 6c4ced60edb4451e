"""Secure aggregation: discrete noise, integers modulo 2^b, and a protocol in which the server learns only their sum."""
