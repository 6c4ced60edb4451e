"""The Flower engine: the same queries, on other machines. The one door to flwr."""
