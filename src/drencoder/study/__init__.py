"""Methods x budgets x seeds: one engine for `drencoder compare` and the scripts in `benchmarks/`.

`cells` says what is run and keeps what came out, `tuning` says which cell comes next, `pool` runs them, `tables` writes them down.
No other room imports this one except `cli`, so anything here may change without touching a user's run.
"""
