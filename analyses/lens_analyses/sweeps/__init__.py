"""Many runs from one file: models × analyses × tasks, resumable, with a page that leads to each report."""
