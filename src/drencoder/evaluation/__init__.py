"""How good an adapter is: held-out loss, multiple choice, benchmark scores, and the statistics to compare them.

A new measure is added here. Nothing in this room may read the records of a client."""
