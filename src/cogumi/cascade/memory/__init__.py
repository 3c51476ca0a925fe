"""Data stored by a running cascade: turns, cached answers, ratings, and corrections learned from ratings."""
