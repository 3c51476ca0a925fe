"""The shippable folder of a cascade: its format, its packed form, and unpacking."""
