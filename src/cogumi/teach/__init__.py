"""Models answer questions and are graded: base responses, solution paths, tier answers; later teachers."""
