"""Steps between `load` and `split` that select rows: each keeps a reason for every row that it drops."""
