"""Generated work directories ("worlds") and tasks over them.

`draw_world(seed, split)` returns a directory such as people keep: settings, tables, logs, notes, mail, code. An
`Operation` draws tasks over a world, each with an oracle that runs, a verifier, several phrasings and a difficulty.
"""
