"""The study of the paper's three leakages: no protection, FedCG, DR-Encoder and a sketch, attacked alike (docs/results/leakages.md)."""
