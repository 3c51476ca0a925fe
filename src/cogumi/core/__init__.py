"""What every package may use: nouns, errors, files and artifacts, the stage contract, shapes, chat templates.

Imports no other package.
"""
