"""One round: the query, what a client sends, what the server releases, and the server's optimiser; engines deliver.

A new transport implements `engine.Engine`; `remote/` has what every transport to other machines shares."""
