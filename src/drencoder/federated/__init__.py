"""One round: the query, what a client sends, what the server releases, and the server's optimiser; engines deliver.

A new transport to other machines implements `remote/transport.Transport`; `remote/` has what all of them share."""
