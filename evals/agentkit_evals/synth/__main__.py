"""`python -m agentkit_evals.synth DIR INSTRUCTIONS`: the tokenizer and the training rows of the packaged model."""

import typer

from agentkit_evals.synth import synth_extra

with synth_extra():
    from agentkit_evals.synth.training import main

if __name__ == "__main__":
    typer.run(main)
