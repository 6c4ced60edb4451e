"""The remote engine over Flower: apps, deployment, simulation, processes and keys.

Only this room imports Flower. Another transport would be a room beside it."""
