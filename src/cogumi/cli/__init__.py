"""The command line: commands, terminal chat, tables and progress bars."""
