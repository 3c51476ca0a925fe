"""How outputs are judged: graders, the code sandbox, calibration and metrics."""
