"""DR-Encoder's auto-encoder and FedCG as published, and the encoders that they are compared with.

Nothing in a user's default run needs this room: it is here so that the paper's methods can be run under the same accountant."""
