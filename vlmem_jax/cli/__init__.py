"""The command `vlmem`: one module a subcommand. They parse, call and print; nothing is computed here."""
