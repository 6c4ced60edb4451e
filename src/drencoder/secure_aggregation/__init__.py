"""Secure aggregation: a server learns the sum of its clients' integers and nothing else.

Words: a *client* owns records, here as everywhere in the package. A *node* is a machine that hosts several clients: it adds
up their noised codes and takes part in the protocol for all of them. `SecAggClient` is a node's side of one round (in the
protocol's literature the party that is not the server is a client), `SecAggServer` is the server's side. A `ProtocolStep` is
one of the five exchanges between them.

This room knows integers, keys and messages, and no model, encoder or epsilon. The protocol may change here as long as sums stay exact."""
