"""How the tiny model is made: tokenizer, data, optimiser, loop. `python -m agentkit_engine.training --help`."""
