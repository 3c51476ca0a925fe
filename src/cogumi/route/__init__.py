"""Numbers in, decisions out: signals, gates, calibration, the guarantee. Pure, numpy only."""
