"""What a run costs and who may release: sampling, accounting, observers, plan, ledgers and the mechanism.

Only `mechanism` makes a `Release`, and only after a ledger has charged it. Nothing here knows models, encoders or transports."""
