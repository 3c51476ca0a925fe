"""The page of the server: a client of its HTTP API, made with Gradio."""
