"""Numbers in, decisions out: signals, gates, calibrators, the guarantee, policies.

Pure: numpy only, no models, no files of a run.
"""
