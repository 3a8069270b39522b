"""Generated work directories ("worlds") and tasks over them.

`draw_world(seed)` returns a directory as people keep them: settings, tables, logs, notes, mail, code. An `Operation`
draws tasks over a world, each with an oracle that runs, a verifier, several phrasings and a difficulty.
"""
