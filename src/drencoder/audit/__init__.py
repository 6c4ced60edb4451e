"""How much a run leaks: attacks on what leaves a client and on what is released, and their measured success.

A new attack is one file in this room. Attacks see what the named observer sees and nothing else."""
