"""How long it takes to open an environment and to run a command in it."""
