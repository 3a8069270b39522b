"""Training of the tiny model: tokenizer, data, optimiser and loop. `python -m agentkit_engine.training --help`."""
