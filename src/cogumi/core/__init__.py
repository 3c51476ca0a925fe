"""The ground of every package: record types, errors, files and artifacts, the stage contract, shapes, chat templates.

Imports no other package.
"""
