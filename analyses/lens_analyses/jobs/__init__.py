"""Analyses started from the dashboard: a queue in the folder of runs, and workers that compute it.

The dashboard only writes rows into `jobs.sqlite` and reads them; `lens worker` makes each run in a
process of its own, by the same command that a person would type.
"""
