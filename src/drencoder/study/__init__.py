"""Methods x budgets x seeds: tuning, cells, tables. Nothing in a single run needs this room."""
