"""The least important weights become zero."""
