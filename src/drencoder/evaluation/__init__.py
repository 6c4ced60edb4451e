"""How good an adapter is: held-out loss, multiple choice, lm-eval's benchmarks, and the statistics to compare them.

A new measure is added here. Nothing in this room may read the records of a client."""
