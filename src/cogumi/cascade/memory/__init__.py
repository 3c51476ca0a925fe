"""What a running cascade keeps: turns, answers, feedback, and what it learns from them."""
