"""The `lens` command, batch runs, run folders and reports.

`cli` reads arguments and imports the rest on use; `config` is what a run is asked to do, `inputs` turns it
into prompts, `runner` computes them into a run folder, `report` writes that folder up.
"""
